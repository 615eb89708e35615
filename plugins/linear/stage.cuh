// A block of 8 warps that multiplies rows with tiles of weights; the frame of linear layers and experts_up.
//
// A warp has its own share of k in every tile: it stages that share of the rows itself and multiplies it, so that
// nothing in a block waits for anything but the sums of a turn. A block takes less than half a multiprocessor: the next
// kernel's moves in while this one works and starts fetching its weights, which keeps memory busy through what kernels
// spend waiting for each other.
#pragma once
#include "tile.cuh"

#ifndef RESIDENT
#define RESIDENT 2
#endif
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int PIECE = 256;  // k that a warp stages at a time

struct Input {
    const float* x;             // row t: x + t * x_stride
    const float* norm_weight;   // null, or a zero-centred RMS norm in front
    const float* head_squares;  // null, or [T, k / head_dim, head_parts]: x is to be divided by the root mean square of
    const int* position;        //   every head, whose squares these are. position: of row 0; addresses rings
    float epsilon;
    int x_stride;
    int head_dim;               // a multiple of 8
    int head_parts;
    int k;
    int rows;
    int groups;                 // tiles of a turn, 1 to WARPS: a warp each finishes them
    int depth;                  // passes that a warp has under way, 1 to MAX_DEPTH
};

struct Staged {
    float squares[MAX_ROWS][WARPS];  // sums of squares of the warps' shares
    uint32_t largest[WARPS][MAX_ROWS];
};

// A warp's share of k.
struct Share {
    int begin, end;
};
DEVICE Share share_of(int k) {
    int size = (k + 64 * WARPS - 1) / (64 * WARPS) * 64, warp = threadIdx.x >> 5;
    return {min(warp * size, k), min(warp * size + size, k)};
}

DEVICE float head_factor(const Input& in, int row, int k) {
    int heads = (int)__fdividef(in.k + 0.5f, in.head_dim), head = (int)__fdividef(k + 0.5f, in.head_dim);
    const float* parts = in.head_squares + (row * heads + head) * in.head_parts;
    float sum = 0.f;
    if (in.head_parts == 4) {
        float4 p = __ldcg((const float4*)parts);
        sum = (p.x + p.y) + (p.z + p.w);
    } else {
        for (int i = 0; i < in.head_parts; i++) sum += __ldcg(parts + i);
    }
    return rsqrtf(__fdividef(sum, in.head_dim) + in.epsilon);
}

// The warp's share of all rows. With a norm in front, x * (1 + weight), and the squares of x: the row's factor is
// applied to the product. weight: the lane's eight values of the norm's in the first piece.
DEVICE void stage(uint8_t* vectors, Staged& staged, const Input& in, const float (&weight)[8], Share share, int format) {
    constexpr int BATCH = 4;  // loads that wait together
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, stride = vector_bytes(in.k);
    int pieces = (share.end - share.begin + PIECE - 1) / PIECE, count = in.rows * pieces;
    if (lane < MAX_ROWS) staged.squares[lane][warp] = 0.f, staged.largest[warp][lane] = 0;
    __syncwarp();
    int row = 0, piece = 0;
    for (int from = 0; from < count; from += BATCH) {
        float x[BATCH][8] = {}, factor[BATCH];
        int rows[BATCH], at[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            rows[i] = row, at[i] = share.begin + piece * PIECE + lane * 8, factor[i] = 1.f;
            if (from + i < count && at[i] < share.end) {
                load_eight(x[i], in.x + (int64_t)row * in.x_stride + at[i]);
                if (in.head_squares) factor[i] = head_factor(in, row, at[i]);
            }
            if (++piece == pieces) piece = 0, row++;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (from + i >= count) break;
            float squares = 0.f;
            uint32_t largest = 0;
            if (in.norm_weight) {
                float other[8] = {};
                bool first = at[i] < share.begin + PIECE;
                if (!first && at[i] < share.end) load_eight(other, in.norm_weight + at[i]);
#pragma unroll
                for (int j = 0; j < 8; j++) squares += x[i][j] * x[i][j], x[i][j] *= 1.f + (first ? weight[j] : other[j]);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) x[i][j] *= factor[i], largest = max(largest, magnitude_bits(x[i][j]));
            if (at[i] < share.end) put_raw(vectors + 2 * rows[i] * stride + chunk_place(at[i] / 8), stride, x[i]);
            largest = __reduce_max_sync(ALL_LANES, largest);
            if (in.norm_weight) squares = warp_sum(squares);
            if (lane == 0) {
                staged.squares[rows[i]][warp] += squares;
                staged.largest[warp][rows[i]] = max(staged.largest[warp][rows[i]], largest);
            }
        }
    }
    __syncwarp();
    for (int r = 0; r < in.rows; r++) {
        float scale = scale_of(staged.largest[warp][r], format);
        for (int k = share.begin + lane * 8; k < share.end; k += PIECE)
            split_raw(vectors + 2 * r * stride + chunk_place(k / 8), stride, scale, format);
    }
    __syncwarp();
}

DEVICE float rms_factor(const Staged& staged, const Input& in, int row) {
    if (!in.norm_weight) return 1.f;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += staged.squares[row][i];
    return rsqrtf(__fdividef(sum, in.k) + in.epsilon);
}

// The warps' sums of a turn's tiles, [tile, warp, row, tile row].
struct Partial {
    float* sums;
    int rows;

    DEVICE void put(int tile, int row, int tile_row, float value) const {
        if (row < rows) sums[((tile * WARPS + (threadIdx.x >> 5)) * rows + row) * TILE + tile_row] = value;
    }
    DEVICE float get(int tile, int row, int tile_row) const {
        const float* from = sums + (tile * WARPS * rows + row) * TILE + tile_row;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += from[w * rows * TILE];
        return sum;
    }
};

// A block goes through its tiles (every gridDim.x-th) in turns of in.groups. A Work has
//   EARLY: its tiles are known before the previous kernel has ended; MIXED: they differ in format;
//   choose(): called by all threads after the wait, where not EARLY; tiles(): how many there are;
//   tile, point(index), advance(index): the warp's next tile to fetch, the same of the block's tile after it;
//   format_at(index, until): a tile's, and that of those up to `until`;
//   prepare(index): what finish will need of weights; ask(prepared): of what the previous kernel wrote;
//   finish(index, prepared, staged, partial, place): by a warp, for the tile at a place of the turn;
//   turned(turn): called by all threads after each turn.
// shared_memory: the warps' pipelines, the rows' vectors, the sums.
template <int SETS, typename Work>
DEVICE void go_through_tiles(const Input& in, uint4* shared_memory, Staged& staged, Work& work) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3, grid = gridDim.x;
    Share share = share_of(in.k);
    Slot* slots = (Slot*)shared_memory + warp * in.depth;
    uint8_t* vectors = (uint8_t*)((Slot*)shared_memory + WARPS * in.depth);
    Partial partial = {(float*)(vectors + 2 * in.rows * vector_bytes(in.k)), in.rows};
    float norm_weight[8] = {};
    if (in.norm_weight && share.begin + lane * 8 < share.end) load_eight(norm_weight, in.norm_weight + share.begin + lane * 8);

    int first = blockIdx.x, tiles = 0;
    if (Work::EARLY) {
        tiles = work.tiles();
    } else {
        wait_for_previous();
        launch_next();
        work.choose();
        tiles = work.tiles();
    }
    auto prepare = [&] { return work.prepare(warp < in.groups ? first + warp * grid : tiles); };
    auto prepared = prepare();

    int until = 0, format = -1, staged_format = -1, begin = 0, end = 0;  // of the tile to multiply
    auto look_at = [&](int index) {
        format = work.format_at(index, until);
        begin = bytes_of(share.begin, format), end = bytes_of(share.end, format);
    };
    if (first < tiles) look_at(first);
    int next = first, next_at = 0, next_end = 0;
    bool working = share.begin < share.end;
    auto begin_next = [&] {
        next_at = bytes_of(share.begin, work.tile.format), next_end = bytes_of(share.end, work.tile.format);
    };
    if (working && next < tiles) work.point(next), begin_next();
    auto fetch_next = [&](int slot) {
        if (working && next < tiles) {
            fetch(slots[slot], work.tile, next_at, next_end);
            next_at += PASS;
            if (next_at >= next_end) {
                next += grid;
                if (next < tiles) work.advance(next), begin_next();
            }
        }
        copy_commit();
    };
    for (int slot = 0; slot < in.depth; slot++) fetch_next(slot);
    if (Work::EARLY) {
        wait_for_previous();
        launch_next();
    }
    work.ask(prepared);

    int columns[SETS], slot = 0;
    float unscale[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        int row = s * SET_ROWS + (lane >> 3);
        columns[s] = (2 * (row < in.rows ? row : 0) + (lane >> 2 & 1)) * vector_bytes(in.k);
    }
    Sums<SETS> sums;
    for (; first < tiles; first += in.groups * grid) {
        for (int i = 0; i < in.groups; i++) {
            int index = first + i * grid;
            if (index >= tiles) break;
            if (index >= until) look_at(index);
            if (format != staged_format) {
                stage(vectors, staged, in, norm_weight, share, format);
                staged_format = format;
#pragma unroll
                for (int s = 0; s < SETS; s++) unscale[s] = unscale_of(staged.largest[warp][s * SET_ROWS + t], format);
            }
            sums.clear();
            for (int at = begin; at < end; at += PASS) {
                wait_for_pass(in.depth);
                multiply(sums, slots[slot], format, at, begin, end, vectors, columns);
                __syncwarp();
                fetch_next(slot);
                slot = slot + 1 == in.depth ? 0 : slot + 1;
            }
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                partial.put(i, s * SET_ROWS + t, lane >> 2, sums.total(s, 0) * unscale[s]);
                partial.put(i, s * SET_ROWS + t, (lane >> 2) + 8, sums.total(s, 1) * unscale[s]);
            }
        }
        __syncthreads();
        if (warp < in.groups && first + warp * grid < tiles) work.finish(prepared, staged, partial, warp);
        work.turned(first == (int)blockIdx.x, staged);
        if (first + in.groups * grid < tiles) {
            __syncthreads();  // the sums have been read
            first += in.groups * grid;
            prepared = prepare();
            work.ask(prepared);
            first -= in.groups * grid;
        }
    }
}

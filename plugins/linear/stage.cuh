// A block of 8 warps that multiplies rows with tiles of weights; the frame of linear layers and experts_up.
//
// k is cut into eight shares. Each warp stages one of them; the products of a share are summed up by themselves, and
// shares joined pair by pair, so that a tile may be one warp's or shared by two, four or eight: the bits are the same.
// A block takes less than half a multiprocessor: the next kernel's moves in while this one works and starts fetching its
// weights, which keeps memory busy through what kernels spend waiting for each other.
#pragma once
#include "tile.cuh"

#ifndef RESIDENT
#define RESIDENT 2
#endif
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int PIECE = 256;  // k that a warp stages at a time: eight values a lane

struct Input {
    const float* x;             // row t: x + t * x_stride
    const float* norm_weight;   // null, or a zero-centred RMS norm in front
    const float* head_squares;  // null, or [T, k / head_dim, head_parts]: x is to be divided by the root mean square of
    const int* position;        //   every head, whose squares these are. position: of row 0; addresses rings
    float epsilon;
    int x_stride;
    int head_dim;               // a multiple of 16
    int head_parts;
    int k;
    int rows;
    int slots;                  // passes that a block has room for
    int late;                   // start the next kernel only after the wait (see common.cuh)
};

struct Staged {
    float squares[MAX_ROWS][WARPS];  // sums of squares of the shares
    uint32_t largest[WARPS][MAX_ROWS];
};

struct Share {
    int begin, end;
};
DEVICE int share_size(int k) { return (k + 64 * WARPS - 1) / (64 * WARPS) * 64; }
DEVICE Share share_of(int k, int share) {
    int size = share_size(k);
    return {min(share * size, k), min(share * size + size, k)};
}

// ---- staging -----------------------------------------------------------------------------------------------------
// PIECES: 1 where a share is one piece, else 2.

// The weights of the norm for a lane's values.
template <int PIECES>
struct NormWeight {
    float value[PIECES][8];
    DEVICE void load(const Input& in, int from, int end) {
        int k = from + (threadIdx.x & 31) * 8;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
#pragma unroll
            for (int j = 0; j < 8; j++) value[p][j] = 0.f;
            if (in.norm_weight && k + p * PIECE < end) load_eight(value[p], in.norm_weight + k + p * PIECE);
        }
    }
};

// PIECES pieces of up to four rows.
template <int PIECES>
struct Rows {
    float x[SET_ROWS][PIECES][8];
    float factor[SET_ROWS];  // of the head that is the lane's in counting from the first one here

    DEVICE static int head_at(const Input& in, int k) { return (int)__fdividef(k + 0.5f, in.head_dim); }

    DEVICE void load(const Input& in, int first, int from, int end) {
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int r = 0; r < SET_ROWS; r++) {
            if (first + r >= in.rows) break;
            const float* row = in.x + (int64_t)(first + r) * in.x_stride;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                int k = from + p * PIECE + lane * 8;
#pragma unroll
                for (int j = 0; j < 8; j++) x[r][p][j] = 0.f;
                if (k < end) load_eight(x[r][p], row + k);
            }
        }
        if (in.head_squares) load_factors(in, first, from);
    }
    DEVICE void load_factors(const Input& in, int first, int from) {
        int heads = head_at(in, in.k), head = min(head_at(in, from) + (int)(threadIdx.x & 31), heads - 1);
        const float* squares = in.head_squares + (first * heads + head) * in.head_parts;
        float4 parts[SET_ROWS];
#pragma unroll
        for (int r = 0; r < SET_ROWS; r++) {
            if (first + r >= in.rows) break;
            const float* own = squares + r * heads * in.head_parts;
            parts[r] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (in.head_parts == 4) parts[r] = __ldcg((const float4*)own);
            else
#pragma unroll 1
                for (int i = 0; i < in.head_parts; i++) parts[r].x += __ldcg(own + i);
        }
#pragma unroll
        for (int r = 0; r < SET_ROWS; r++) {
            if (first + r >= in.rows) break;
            float sum = (parts[r].x + parts[r].y) + (parts[r].z + parts[r].w);
            factor[r] = rsqrtf(__fdividef(sum, in.head_dim) + in.epsilon);
        }
    }

    // The norm per head, or the weights of the norm in front; that one's factor is applied to the product.
    DEVICE void apply(const Input& in, const NormWeight<PIECES>& weight, int first, int from, float (&squares)[SET_ROWS],
                      uint32_t (&largest)[SET_ROWS]) {
        int lane = threadIdx.x & 31, head[PIECES] = {};
#pragma unroll
        for (int p = 0; p < PIECES; p++)
            if (in.head_squares) head[p] = head_at(in, from + p * PIECE + lane * 8) - head_at(in, from);
#pragma unroll
        for (int r = 0; r < SET_ROWS; r++) {
            if (first + r >= in.rows) break;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                if (in.head_squares) {
                    float own = __shfl_sync(ALL_LANES, factor[r], head[p] & 31);
#pragma unroll
                    for (int j = 0; j < 8; j++) x[r][p][j] *= own;
                } else if (in.norm_weight) {
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        squares[r] += x[r][p][j] * x[r][p][j], x[r][p][j] *= 1.f + weight.value[p][j];
                }
#pragma unroll
                for (int j = 0; j < 8; j++) largest[r] = max(largest[r], magnitude_bits(x[r][p][j]));
            }
        }
    }
};

// The warp's share of four rows from `first` on. rows, weight: its first pieces.
template <int FORMAT, int PIECES>
DEVICE void stage(uint8_t* vectors, Staged& staged, const Input& in, NormWeight<PIECES>& weight, Rows<PIECES>& rows, int first) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, stride = vector_bytes(in.k);
    Share share = share_of(in.k, warp);
    float squares[SET_ROWS] = {}, scale[SET_ROWS] = {};
    uint32_t largest[SET_ROWS] = {};
    auto put = [&](int from) {
#pragma unroll
        for (int r = 0; r < SET_ROWS; r++) {
            if (first + r >= in.rows) break;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                int k = from + p * PIECE + lane * 8;
                uint8_t* place = vectors + 2 * (first + r) * stride + chunk_place(k / 8);
                if (k < share.end) put_split<FORMAT>(place, stride, rows.x[r][p], scale[r]);
            }
        }
    };
    auto find_scales = [&] {
#pragma unroll
        for (int r = 0; r < SET_ROWS; r++) {
            if (first + r >= in.rows) break;
            largest[r] = __reduce_max_sync(ALL_LANES, largest[r]);
            scale[r] = scale_of<FORMAT>(largest[r]);
            float sum = in.norm_weight ? warp_sum(squares[r]) : 0.f;
            if (lane == 0) staged.largest[warp][first + r] = largest[r], staged.squares[first + r][warp] = sum;
        }
    };
    if (PIECES == 1) {
        rows.apply(in, weight, first, share.begin, squares, largest);
        find_scales();
        put(share.begin);
        return;
    }
    bool once = share.end - share.begin <= PIECES * PIECE;
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {  // the largest first, then the parts
#pragma unroll 1
        for (int from = share.begin; from < share.end; from += PIECES * PIECE) {
            if (!once && (turn || from > share.begin)) {
                rows.load(in, first, from, share.end);
                weight.load(in, from, share.end);
            }
            if (!turn || !once) rows.apply(in, weight, first, from, squares, largest);
            if (turn) put(from);
        }
        if (!turn) find_scales();
    }
}

// All rows. loaded, weight: the first four rows' first pieces.
template <int SETS, int FORMAT, int PIECES>
DEVICE void stage_all(uint8_t* vectors, Staged& staged, const Input& in, NormWeight<PIECES>& weight, Rows<PIECES>& loaded) {
    stage<FORMAT, PIECES>(vectors, staged, in, weight, loaded, 0);
    if (SETS == 1 || in.rows <= SET_ROWS) return;
    Share share = share_of(in.k, threadIdx.x >> 5);
    weight.load(in, share.begin, share.end);
    loaded.load(in, SET_ROWS, share.begin, share.end);
    stage<FORMAT, PIECES>(vectors, staged, in, weight, loaded, SET_ROWS);
}

DEVICE float rms_factor(const Staged& staged, const Input& in, int row) {
    if (!in.norm_weight) return 1.f;
    const float* s = staged.squares[row];
    float sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    return rsqrtf(__fdividef(sum, in.k) + in.epsilon);
}

// ---- tiles -------------------------------------------------------------------------------------------------------

// The tiles of a block, every `grid`-th from `index` on, and how its warps share them.
struct Plan {
    int tiles, index, grid;
    int ways;    // warps of a tile; 1 if they are more than four, else as many as there are warps for
    int active;  // warps with a tile, as warps 0..active - 1

    DEVICE static Plan of(int tiles, int index, int grid) {
        int each = (tiles + grid - 1) / grid;
        int ways = each <= 1 ? 8 : each == 2 ? 4 : each <= 4 ? 2 : 1;
        return {tiles, index, grid, ways, min(each * ways, WARPS)};
    }
    DEVICE int first() const { return index + (threadIdx.x >> 5) / ways * grid; }
    DEVICE int step() const { return WARPS / ways * grid; }
    DEVICE int shares() const { return WARPS / ways; }  // of a warp in a tile
    DEVICE int first_share() const { return (threadIdx.x >> 5) % ways * shares(); }
};

// A warp's weights on their way: its shares of its tiles, in passes. A Work has tile<FORMAT>(index).
template <int FORMAT, typename Work>
struct Stream {
    const Work& work;
    Slot* slots;
    int depth, tiles, step;
    int begin, end, size;  // of the warp's shares, of one of them, in bytes of a weight row
    Tile tile;
    int next, at, stop;    // where to go on

    DEVICE Stream(const Work& work, const Input& in, const Plan& plan, uint4* memory) : work(work) {
        int warp = threadIdx.x >> 5;
        depth = min(in.slots / plan.active, MAX_DEPTH);
        slots = (Slot*)memory + warp * depth;
        tiles = plan.tiles, step = plan.step();
        size = bytes_of(share_size(in.k), FORMAT), end = bytes_of(in.k, FORMAT);
        begin = min(plan.first_share() * size, end), end = min(begin + plan.shares() * size, end);
        next = warp < plan.active && begin < end ? plan.first() : tiles;
        at = stop = 0;
        open();
#pragma unroll 1
        for (int slot = 0; slot < depth && warp < plan.active; slot++) put(slot);
    }
    DEVICE void open() {
        if (next < tiles) tile = work.template tile<FORMAT>(next), at = begin, stop = min(begin + size, end);
    }
    DEVICE void put(int slot) {
        if (next < tiles) {
            fetch<FORMAT>(slots[slot], tile, at, stop);
            at += PASS;
            if (at >= stop) {
                at = stop, stop = min(stop + size, end);
                if (at >= end) next += step, open();
            }
        }
        copy_commit();
    }
};

// Multiplies the block's tiles. A Work also has
//   prepare(index): what finish will need of weights; ask(prepared): of what the previous kernel wrote;
//   finish(prepared, staged, value): value[set][half] belongs to row 4 set + t and the tile's row g + 8 half.
// prepared: the warp's first tile's. exchange: [WARPS, 2 SETS, 32] floats. Needs all shares staged, and a barrier
// between, unless a tile is shared by all warps.
template <int SETS, int FORMAT, typename Work>
DEVICE void multiply_tiles(const Input& in, const Plan& plan, Stream<FORMAT, Work>& stream, const Work& work,
                           typename Work::Prepared prepared, const uint8_t* vectors, const Staged& staged, float* exchange) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3, columns[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        int row = s * SET_ROWS + (lane >> 3);
        columns[s] = (2 * (row < in.rows ? row : 0) + (lane >> 2 & 1)) * vector_bytes(in.k);
    }
    int slot = 0;
#pragma unroll 1
    for (int index = plan.first();; index += plan.step()) {
        bool valid = index < plan.tiles && warp < plan.active;
        float value[2 * SETS] = {}, level[3][2 * SETS];
        int begin = stream.begin;
#pragma unroll 1
        for (int share = 0; valid && share < plan.shares(); share++) {
            int end = min(begin + stream.size, stream.end);
            Sums<SETS> sums;
            sums.clear();
#pragma unroll 1
            for (int at = begin; at < end; at += PASS) {
                wait_for_pass(stream.depth);
                multiply<SETS, FORMAT>(sums, stream.slots[slot], at, begin, end, vectors, columns);
                __syncwarp();
                stream.put(slot);
                slot = slot + 1 == stream.depth ? 0 : slot + 1;
            }
            begin = end;
#pragma unroll
            for (int i = 0; i < 2 * SETS; i++) {
                float unscale = unscale_of<FORMAT>(staged.largest[plan.first_share() + share][i / 2 * SET_ROWS + t]);
                value[i] = sums.total(i / 2, i % 2) * unscale;
                if (share & 1) value[i] = level[0][i] + value[i];
                if ((share & 3) == 3) value[i] = level[1][i] + value[i];
                if ((share & 7) == 7) value[i] = level[2][i] + value[i];
                if (!(share & 1)) level[0][i] = value[i];
                else if (!(share & 2)) level[1][i] = value[i];
                else if (!(share & 4)) level[2][i] = value[i];
            }
        }
        if (plan.ways > 1) {  // then there is one turn
#pragma unroll
            for (int i = 0; i < 2 * SETS; i++) exchange[(warp * 2 * SETS + i) * 32 + lane] = value[i];
            __syncthreads();
            valid = valid && warp % plan.ways == 0;
#pragma unroll
            for (int i = 0; i < 2 * SETS; i++) {
                float v[WARPS];
#pragma unroll
                for (int w = 0; w < WARPS; w++)
                    v[w] = w < plan.ways && valid ? exchange[((warp + w) * 2 * SETS + i) * 32 + lane] : 0.f;
                value[i] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
            }
        }
        if (valid) work.finish(prepared, staged, value);
        if (index + plan.step() >= plan.tiles) break;
        prepared = work.prepare(index + plan.step());
        work.ask(prepared);
    }
}

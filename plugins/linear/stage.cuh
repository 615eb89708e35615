// A block that multiplies rows with tiles of weights; the frame of linear layers and experts_up.
//
// k is cut into eight shares. The products of a share are summed up by themselves, and shares joined pair by pair, so
// that a tile may be one warp's or shared by two, four or eight: the bits are the same. A block leaves room on its
// multiprocessor: the next kernel's moves in while this one works and starts fetching its weights, which keeps memory
// busy through what kernels spend waiting for each other.
#pragma once
#include "tile.cuh"

constexpr int RESIDENT = 2;  // blocks on a multiprocessor: this kernel's and the next one's
constexpr int WARPS = 8;
constexpr int SHARES = WARPS;  // of k: a warp stages one
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
    int slots;                  // passes that a block has room for, one a warp at least
    int late;                   // start the next kernel only after the wait (see common.cuh)
};

struct Staged {
    float squares[MAX_ROWS][SHARES];  // sums of squares of the shares
    uint32_t largest[SHARES][MAX_ROWS];
};

struct Share {
    int begin, end;
};
DEVICE int share_size(int k) { return (k + 64 * SHARES - 1) / (64 * SHARES) * 64; }
DEVICE Share share_of(int k, int share) {
    int size = share_size(k);
    return {min(share * size, k), min(share * size + size, k)};
}

// ---- staging -----------------------------------------------------------------------------------------------------

DEVICE int head_at(const Input& in, int k) { return (int)__fdividef(k + 0.5f, in.head_dim); }

DEVICE float head_factor(const Input& in, int row, int k) {
    const float* parts = in.head_squares + (row * head_at(in, in.k) + head_at(in, k)) * in.head_parts;
    float sum = 0.f;
    if (in.head_parts == 4) {
        float4 p = __ldcg((const float4*)parts);
        sum = (p.x + p.y) + (p.z + p.w);
    } else {
#pragma unroll 1
        for (int i = 0; i < in.head_parts; i++) sum += __ldcg(parts + i);
    }
    return rsqrtf(__fdividef(sum, in.head_dim) + in.epsilon);
}

struct NormWeight {
    float value[8];  // of the lane's first piece
    DEVICE void load(const Input& in, Share share) {
        int k = share.begin + (threadIdx.x & 31) * 8;
        if (in.norm_weight && k < share.end) load_eight(value, in.norm_weight + k);
    }
};

// The warp's share of all rows. With a norm in front, x * (1 + weight), and the squares of x: the row's factor is
// applied to the product.
DEVICE void stage(uint8_t* vectors, Staged& staged, const Input& in, const NormWeight& weight, int format) {
    constexpr int BATCH = 4;  // pieces of rows whose loads wait together
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, stride = vector_bytes(in.k), first_row = 0, first_piece = 0;
    Share share = share_of(in.k, warp);
    int pieces = (share.end - share.begin + PIECE - 1) / PIECE, count = in.rows * pieces;
    if (lane < MAX_ROWS) staged.squares[lane][warp] = 0.f, staged.largest[warp][lane] = 0;
    __syncwarp();
    auto advance = [&](int& row, int& piece) {
        if (++piece == pieces) piece = 0, row++;
    };
#pragma unroll 1
    for (int from = 0; from < count; from += BATCH) {
        float x[BATCH][8], factor[BATCH];
        int row = first_row, piece = first_piece;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (from + i >= count) break;
            int at = share.begin + piece * PIECE + lane * 8;
#pragma unroll
            for (int j = 0; j < 8; j++) x[i][j] = 0.f;
            if (at < share.end) load_eight(x[i], in.x + (int64_t)row * in.x_stride + at);
            advance(row, piece);
        }
        if (in.head_squares) {  // while the values are under way
            row = first_row, piece = first_piece;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                if (from + i >= count) break;
                factor[i] = head_factor(in, row, min(share.begin + piece * PIECE + lane * 8, in.k - 1));
                advance(row, piece);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (from + i >= count) break;
            int at = share.begin + first_piece * PIECE + lane * 8;
            bool inside = at < share.end;
            float squares = 0.f;
            uint32_t largest = 0;
            if (in.norm_weight) {
                float other[8];
                if (first_piece && inside) load_eight(other, in.norm_weight + at);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    squares += x[i][j] * x[i][j];
                    if (inside) x[i][j] *= 1.f + (first_piece ? other[j] : weight.value[j]);
                }
                squares = warp_sum(squares);
            }
            if (in.head_squares) {
#pragma unroll
                for (int j = 0; j < 8; j++) x[i][j] *= factor[i];
            }
#pragma unroll
            for (int j = 0; j < 8; j++) largest = max(largest, magnitude_bits(x[i][j]));
            if (inside) put_raw(vectors + 2 * first_row * stride + chunk_place(at / 8), stride, x[i]);
            largest = __reduce_max_sync(ALL_LANES, largest);
            if (lane == 0) {
                staged.squares[first_row][warp] += squares;
                staged.largest[warp][first_row] = max(staged.largest[warp][first_row], largest);
            }
            advance(first_row, first_piece);
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < in.rows; r++) {
        float scale = scale_of(staged.largest[warp][r], format);
#pragma unroll 1
        for (int k = share.begin + lane * 8; k < share.end; k += PIECE)
            split_raw(vectors + 2 * r * stride + chunk_place(k / 8), stride, scale, format);
    }
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
    int ways;    // warps of a tile, as many as there are warps for
    int active;  // warps with a tile: 0..active - 1

    DEVICE static Plan of(int tiles, int index, int grid) {
        int each = (tiles + grid - 1) / grid;
        int ways = each <= WARPS / 8 ? 8 : each <= WARPS / 4 ? 4 : each <= WARPS / 2 ? 2 : 1;
        return {tiles, index, grid, ways, min(each * ways, WARPS)};
    }
    DEVICE int first() const { return index + (threadIdx.x >> 5) / ways * grid; }
    DEVICE int step() const { return WARPS / ways * grid; }
    DEVICE int shares() const { return SHARES / ways; }  // of a warp in a tile
    DEVICE int first_share() const { return (threadIdx.x >> 5) % ways * shares(); }
};

// A warp's weights on their way: its shares of its tiles, in passes. A Work has tile(index).
template <typename Work>
struct Stream {
    const Work& work;
    Slot* slots;
    int format, depth, tiles, step;
    int begin, end, size;  // of the warp's shares, of one of them, in bytes of a weight row
    Tile tile;
    int next, at, stop;    // where to go on

    DEVICE Stream(const Work& work, const Input& in, const Plan& plan, int format, uint4* memory)
        : work(work), format(format) {
        int warp = threadIdx.x >> 5;
        depth = min(in.slots / plan.active, MAX_DEPTH), slots = (Slot*)memory + warp * depth;
        tiles = plan.tiles, step = plan.step();
        size = bytes_of(share_size(in.k), format), end = bytes_of(in.k, format);
        begin = min(plan.first_share() * size, end), end = min(begin + plan.shares() * size, end);
        next = begin < end && warp < plan.active ? plan.first() : tiles;
        at = stop = 0;
        open();
#pragma unroll 1
        for (int slot = 0; slot < depth; slot++) put(slot);
    }
    DEVICE void open() {
        if (next < tiles) tile = work.tile(next), at = begin, stop = min(begin + size, end);
    }
    DEVICE void put(int slot) {
        if (next < tiles) {
            fetch(slots[slot], tile, at, stop, format);
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
// between.
template <int SETS, typename Work>
DEVICE void multiply_tiles(const Input& in, const Plan& plan, Stream<Work>& stream, const Work& work,
                           typename Work::Prepared prepared, const uint8_t* vectors, const Staged& staged,
                           float* exchange) {
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
                multiply<SETS>(sums, stream.slots[slot], stream.format, at, begin, end, vectors, columns);
                __syncwarp();
                stream.put(slot);
                slot = slot + 1 == stream.depth ? 0 : slot + 1;
            }
            begin = end;
#pragma unroll
            for (int i = 0; i < 2 * SETS; i++) {
                uint32_t largest = staged.largest[plan.first_share() + share][i / 2 * SET_ROWS + t];
                float unscale = unscale_of(largest, stream.format);
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
                float v[SHARES];
#pragma unroll
                for (int w = 0; w < SHARES; w++)
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

// Staging of activation rows in shared memory for plugins/linear/tile.cuh, with what stands before the product.
#pragma once
#include "tile.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

struct Input {
    const float* x;             // row t: x + t * x_stride
    const float* norm_weight;   // null: x as it is
    const float* z;             // null, or the gate of Gated DeltaNet: x = norm_weight * rms(x per head) * silu(z)
    const int* position;        // of row 0; addresses the rings
    float epsilon;
    int x_stride;
    int z_stride;
    int z_ring_mask;
    int head_dim;               // of the gated norm: 8 to 256, a power of two
    int k;
    int rows;
    int padding;
};

struct Shared {
    float squares[WARPS][MAX_ROWS];    // partial sums of squares
    float partial[2][WARPS][TILE * MAX_ROWS];
};

// x -> norm_weight * rms(x per head) * silu(z) for the lane's eight values; a head's lanes are neighbours.
DEVICE void gate_heads(float (&x)[8], const Input& in, int row, int k) {
    int slot = in.z_ring_mask ? (__ldcg(in.position) + row) & in.z_ring_mask : row;
    float z[8] = {}, sum = 0.f;
    if (k < in.k) load_eight(z, in.z + (int64_t)slot * in.z_stride + k);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * x[i];
    for (int offset = in.head_dim / 16; offset; offset >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    float factor = rsqrtf(sum / in.head_dim + in.epsilon);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= factor * in.norm_weight[(k + i) & (in.head_dim - 1)] * silu(z[i]);
}

// Entries of all rows; where there is a zero-centred norm, x * (1 + weight), and its squares for `rms_factor`: the
// row's factor is applied to the product, so that staging takes one pass.
DEVICE void stage(uint4* entries, Shared& shared, const Input& in, bool nvfp4) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int t = 0; t < in.rows; t++) {
        uint4* row = entries + t * entry_stride(in.k);
        float squares = 0.f;
        for (int from = warp * 256; from < in.k; from += WARPS * 256) {
            int k = from + lane * 8;
            float x[8] = {}, w[8];
            if (k < in.k) load_eight(x, in.x + (int64_t)t * in.x_stride + k);
            if (in.z) {
                gate_heads(x, in, t, k);
            } else if (in.norm_weight && k < in.k) {
                load_eight(w, in.norm_weight + k);
#pragma unroll
                for (int i = 0; i < 8; i++) squares += x[i] * x[i], x[i] *= 1.f + w[i];
            }
            if (k < in.k) make_entries(row[entry_place(k / 4)], row[entry_place(k / 4 + 1)], x, nvfp4);
        }
        if (in.norm_weight && !in.z) {
            squares = warp_sum(squares);
            if (lane == 0) shared.squares[warp][t] = squares;
        }
    }
    __syncthreads();
}

DEVICE float rms_factor(const Shared& shared, const Input& in, int row) {
    if (!in.norm_weight || in.z) return 1.f;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared.squares[w][row];
    return rsqrtf(sum / in.k + in.epsilon);
}

// A warp's share of a tile -> shared.partial[buffer][warp][tile row * MAX_ROWS + row].
DEVICE void put_sums(Shared& shared, int buffer, const Sums& sums, int rows) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, column = (lane & 3) * 2;
    float* out = shared.partial[buffer][warp];
    if (column < rows) {
        out[g * MAX_ROWS + column] = sums.total(0);
        out[g * MAX_ROWS + column + 1] = sums.total(1);
        out[(g + 8) * MAX_ROWS + column] = sums.total(2);
        out[(g + 8) * MAX_ROWS + column + 1] = sums.total(3);
    }
}

DEVICE float sum_of_warps(const Shared& shared, int buffer, int tile_row, int row) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared.partial[buffer][w][tile_row * MAX_ROWS + row];
    return sum;
}

// A tile of 16 weight rows: the lane's two rows of it, and what `finish` has to know.
struct Tile {
    RowPair rows;
    int row_bytes;
    int format;
    int first;  // weight row
    int id;     // of the segment or the item
};

// A block goes through the tiles blockIdx.x, blockIdx.x + gridDim.x, ... in passes of what its warps hold at once.
// EARLY: the first tile is known before the previous kernel has ended. total(): number of tiles; find(index): a tile;
// started(): called once after staging; finish(tile, buffer): its sums are in shared.partial[buffer].
template <int STEPS, bool EARLY, typename Total, typename Find, typename Started, typename Finish>
DEVICE void go_through_tiles(const Input& in, uint4* entries, Shared& shared, const Total& total, const Find& find,
                             const Started& started, const Finish& finish) {
    constexpr int PASS = WARPS * STEPS * STEP;  // bytes of a row
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
    int offset = warp * STEPS * STEP + (lane & 3) * 16, index = blockIdx.x;
    Tile tile;
    Weights<STEPS> weights;
    if (EARLY) {
        tile = find(index);
        load(weights, tile.rows, tile.format, offset, tile.row_bytes);
    }
    wait_for_previous();
    launch_next();
    int tiles = total();
    if (index >= tiles) return;
    if (!EARLY) {
        tile = find(index);
        load(weights, tile.rows, tile.format, offset, tile.row_bytes);
    }
    const uint4* own = entries + g * entry_stride(in.k);
    bool is_row = g < in.rows;
    auto entry = [&](int i, bool valid) { return is_row && valid ? own[entry_place(i)] : make_uint4(0, 0, 0, 0); };
    int staged = -1, buffer = 0;
    Sums sums;
    sums.clear();
    for (int at = offset; index < tiles;) {
        int order = tile.format == NVFP4;
        if (order != staged) {
            if (staged >= 0) __syncthreads();  // slower warps still read the other order
            stage(entries, shared, in, order);
            if (staged < 0) started();
            staged = order;
        }
        bool last = at - offset + PASS >= tile.row_bytes;
        multiply<STEPS>(sums, weights, tile.format, at, tile.row_bytes, entry);
        Tile finished = tile;
        at = last ? offset : at + PASS;
        if (last) index += gridDim.x;
        if (index < tiles) {
            if (last) tile = find(index);
            load(weights, tile.rows, tile.format, at, tile.row_bytes);
        }
        if (last) {
            put_sums(shared, buffer, sums, in.rows);
            sums.clear();
            __syncthreads();
            finish(finished, buffer);
            buffer ^= 1;
        }
    }
}

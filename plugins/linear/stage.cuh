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
        uint4* row = entries + t * (in.k / 4);
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
            if (k < in.k) make_entries(row[entry_place(k / 4, t)], row[entry_place(k / 4 + 1, t)], x, nvfp4);
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

constexpr int DEPTH = 3;  // passes that a warp has under way
typedef Pipeline<DEPTH> WarpPipeline;
constexpr int PIPELINES = WARPS * sizeof(WarpPipeline) / sizeof(uint4);

// A block goes through the tiles blockIdx.x, blockIdx.x + gridDim.x, ..., its warps sharing a tile's k, in passes.
// EARLY: tiles are known before the previous kernel has ended. total(): number of tiles; find(index): a tile;
// started(): called once after staging; finish(tile, buffer): its sums are in shared.partial[buffer].
// shared_memory: the warps' pipelines, then the entries of the rows.
template <bool EARLY, typename Total, typename Find, typename Started, typename Finish>
DEVICE void go_through_tiles(const Input& in, uint4* shared_memory, Shared& shared, const Total& total,
                             const Find& find, const Started& started, const Finish& finish) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = lane >> 2;
    WarpPipeline& pipeline = ((WarpPipeline*)shared_memory)[warp];
    uint4* entries = shared_memory + PIPELINES;
    const int begin = warp * PASS;
    int tiles = EARLY ? total() : 0;
    if (!EARLY) {
        wait_for_previous();
        launch_next();
        tiles = total();
    }
    if ((int)blockIdx.x >= tiles) return;  // with EARLY there is a tile for every block

    int next_index = blockIdx.x, next_at = begin;
    Tile next = find(next_index);
    auto fetch_next = [&](int slot) {
        if (next_index < tiles) {
            fetch(pipeline, slot, next, next_at);
            next_at += WARPS * PASS;
            if (next_at - begin >= next.row_bytes) {
                next_index += gridDim.x, next_at = begin;
                if (next_index < tiles) next = find(next_index);
            }
        }
        copy_commit();
    };
    for (int slot = 0; slot < DEPTH; slot++) fetch_next(slot);
    if (EARLY) {
        wait_for_previous();
        launch_next();
    }
    int staged = -1, buffer = 0, slot = 0, row = column < in.rows ? column : 0;
    const int own = 16 * (PIPELINES + row * (in.k / 4));
    Sums sums;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        Tile tile = find(index);
        int order = tile.format == NVFP4;
        if (order != staged) {
            if (staged >= 0) __syncthreads();  // slower warps still read the other order
            stage(entries, shared, in, order);
            if (staged < 0) started();
            staged = order;
        }
        sums.clear();
        for (int at = begin; at - begin < tile.row_bytes; at += WARPS * PASS) {
            copy_wait<DEPTH - 1>();
            __syncwarp();
            multiply(sums, pipeline, slot, tile.format, at, tile.row_bytes, shared_memory, own, row);
            __syncwarp();
            fetch_next(slot);
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
        }
        put_sums(shared, buffer, sums, in.rows);
        __syncthreads();
        finish(tile, buffer);
        buffer ^= 1;
    }
}

// A block of 16 warps that multiplies staged rows with tiles of weights; the frame of linear layers and experts_up.
//
// One block fills less than half a multiprocessor, so that the next kernel's block moves in while this one works and
// starts fetching its weights: memory is kept busy through what kernels spend waiting for each other.
#pragma once
#include "tile.cuh"

#ifndef BLOCK_WARPS
#define BLOCK_WARPS 8
#endif
#ifndef RESIDENT
#define RESIDENT 2
#endif
#ifndef PIPELINE_DEPTH
#define PIPELINE_DEPTH 4
#endif
constexpr int WARPS = BLOCK_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int SEGMENT_K = 256;      // k that a warp stages at a time
constexpr int MAX_K_SEGMENTS = 96;  // so k <= 24576

struct Input {
    const float* x;             // row t: x + t * x_stride
    const float* norm_weight;   // null, or a zero-centred RMS norm in front
    const float* head_squares;  // null, or [T, k / head_dim, head_parts]: x is to be divided by the root mean square of
    const int* position;        //   every head, whose squares these are. position: of row 0; addresses rings
    float epsilon;
    int x_stride;
    int head_dim;
    int head_parts;
    int k;
    int rows;
    int groups;                 // tiles that the block works on side by side, 1 to 8; its warps share them out
    int padding;
};

struct Staged {
    float squares[MAX_ROWS][MAX_K_SEGMENTS];  // sums of squares per SEGMENT_K
};

DEVICE float head_factor(const Input& in, int row, int k) {
    const float* parts = in.head_squares + ((int64_t)row * (in.k / in.head_dim) + k / in.head_dim) * in.head_parts;
    float sum = 0.f;
    for (int i = 0; i < in.head_parts; i++) sum += __ldcg(parts + i);
    return rsqrtf(__fdividef(sum, in.head_dim) + in.epsilon);
}

// Entries of all rows. With a norm in front, x * (1 + weight) and its squares: the row's factor is applied to the
// product instead, so that staging takes one pass. Two pieces a turn, so that their loads wait together.
DEVICE void stage(uint4* entries, Staged& staged, const Input& in, bool nvfp4) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int segments = (in.k + SEGMENT_K - 1) / SEGMENT_K, pieces = in.rows * segments;
    for (int from = warp; from < pieces; from += 2 * WARPS) {
        float x[2][8] = {}, w[2][8] = {}, factor[2] = {1.f, 1.f};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int piece = from + i * WARPS, row = piece / segments, k = piece % segments * SEGMENT_K + lane * 8;
            if (piece >= pieces || k >= in.k) continue;
            load_eight(x[i], in.x + (int64_t)row * in.x_stride + k);
            if (in.norm_weight) load_eight(w[i], in.norm_weight + k);
            if (in.head_squares) factor[i] = head_factor(in, row, k);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int piece = from + i * WARPS, row = piece / segments, k = piece % segments * SEGMENT_K + lane * 8;
            if (piece >= pieces) break;
            float squares = 0.f;
#pragma unroll
            for (int j = 0; j < 8; j++) squares += x[i][j] * x[i][j], x[i][j] *= factor[i] * (1.f + w[i][j]);
            if (in.norm_weight) {
                squares = warp_sum(squares);
                if (lane == 0) staged.squares[row][piece % segments] = squares;
            }
            uint4* out = entries + row * (in.k / 4);
            if (k < in.k) make_entries(out[entry_place(k / 4, row)], out[entry_place(k / 4 + 1, row)], x[i], nvfp4);
        }
    }
    __syncthreads();
}

DEVICE float rms_factor(const Staged& staged, const Input& in, int row) {
    if (!in.norm_weight) return 1.f;
    float sum = 0.f;
    for (int i = 0; i < (in.k + SEGMENT_K - 1) / SEGMENT_K; i++) sum += staged.squares[row][i];
    return rsqrtf(__fdividef(sum, in.k) + in.epsilon);
}

constexpr int DEPTH = PIPELINE_DEPTH;  // passes that a warp has under way
typedef Pipeline<DEPTH> WarpPipeline;
constexpr int PIPELINES = WARPS * sizeof(WarpPipeline) / sizeof(uint4);

// The warps' sums of a tile, [warp, tile row, row], in two buffers that take turns.
struct Partial {
    float* sums;
    int rows, warps;  // warps of a group

    DEVICE void put(const Sums& s) const {
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, column = (lane & 3) * 2;
        float* out = sums + warp * TILE * rows;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i % 2 < rows) out[(g + i / 2 * 8) * rows + column + i % 2] = s.total(i);
    }
    DEVICE float get(int tile_row, int row) const {
        const float* from = sums + (threadIdx.x >> 5) / warps * warps * TILE * rows + tile_row * rows + row;
        float sum = 0.f;
        for (int w = 0; w < warps; w++) sum += from[w * TILE * rows];
        return sum;
    }
};

// A block goes through tiles in turns of in.groups. EARLY: tiles are known before the previous kernel has ended.
// total(): number of tiles; find(index): a tile; started(): called once after staging; prepare(tile, value): what
// `finish` will need from memory, asked for before the product; finish(tile, value, partial, prepared): for each of the
// tile's values; turned(): called by all threads after each turn.
// shared_memory: the warps' pipelines, the entries of the rows, the sums.
template <bool EARLY, typename Total, typename Find, typename Started, typename Prepare, typename Finish, typename Turned>
DEVICE void go_through_tiles(const Input& in, uint4* shared_memory, Staged& staged, const Total& total,
                             const Find& find, const Started& started, const Prepare& prepare, const Finish& finish,
                             const Turned& turned) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = lane >> 2;
    int warps = WARPS / in.groups, group = warp / warps, thread = threadIdx.x % (32 * warps);
    WarpPipeline& pipeline = ((WarpPipeline*)shared_memory)[warp];
    uint4* entries = shared_memory + PIPELINES;
    Partial partial = {(float*)(entries + in.rows * (in.k / 4)), in.rows, warps};
    int other_buffer = WARPS * TILE * in.rows;
    const int begin = warp % warps * PASS, pass = warps * PASS, turn = gridDim.x * in.groups;
    const int first = blockIdx.x * in.groups + group;
    int tiles = EARLY ? total() : 0;
    if (!EARLY) {
        wait_for_previous();
        launch_next();
        tiles = total();
    }

    int next_index = first, next_at = begin;
    Tile next;
    if (first < tiles) next = find(first);
    auto fetch_next = [&](int slot) {
        if (next_index < tiles) {
            fetch(pipeline, slot, next, next_at);
            next_at += pass;
            if (next_at - begin >= next.row_bytes) {
                next_index += turn, next_at = begin;
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
    int order = -1, slot = 0, row = column < in.rows ? column : 0;
    const int own = 16 * (PIPELINES + row * (in.k / 4));
    Sums sums;
    for (int index = first; index - group < tiles; index += turn) {
        bool is_tile = index < tiles;
        Tile tile = find(is_tile ? index : tiles - 1);
        if (order != (tile.format == NVFP4)) {  // the same in all groups of a block: see host side
            if (order >= 0) __syncthreads();    // slower warps still read the other order
            stage(entries, staged, in, tile.format == NVFP4);
            if (order < 0) started();
            order = tile.format == NVFP4;
        }
        auto prepared = prepare(tile, thread);
        if (is_tile) {
            sums.clear();
            for (int at = begin; at - begin < tile.row_bytes; at += pass) {
                copy_wait<DEPTH - 1>();
                __syncwarp();
                multiply(sums, pipeline, slot, tile.format, at, tile.row_bytes, shared_memory, own, row);
                __syncwarp();
                fetch_next(slot);
                slot = slot + 1 == DEPTH ? 0 : slot + 1;
            }
            partial.put(sums);
        }
        if (warps > 1) __syncthreads();
        else __syncwarp();
        if (is_tile) {
            finish(tile, thread, partial, prepared);
            for (int value = thread + 32 * warps; value < TILE * in.rows; value += 32 * warps)
                finish(tile, value, partial, prepare(tile, value));
        }
        turned(index - group);
        partial.sums += other_buffer, other_buffer = -other_buffer;
    }
}

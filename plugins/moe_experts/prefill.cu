// The routed experts on many rows: group the rows by expert, multiply each group with its expert's weights, add up.
// Launched by plugins/moe_experts/prefill.py. Macros: NUM_EXPERTS, TOP_K.
//
// moe_route -> moe_offsets -> moe_scatter -> experts_prefill (gate and up) -> experts_prefill (down) -> moe_combine.
// Nothing goes back to the host: grids are for the worst case, and blocks beyond the list of tiles leave. A pair (row,
// one of its experts) has a place in an order by expert, then row; no float is added in an order that depends on it.
#include "linear/prefill.cuh"
#include "moe_routing/routing.cuh"

constexpr int CHUNK_ROWS = 32;  // rows of one block of moe_route and moe_scatter: bits of a word
constexpr int OFFSET_THREADS = (NUM_EXPERTS + 31) / 32 * 32;
constexpr int COMBINE_THREADS = 256;
constexpr int TILE_PAIRS = 128;
static_assert(OFFSET_THREADS <= 1024, "one thread for each expert");

struct Grouping {
    int* ids;            // [T, TOP_K] experts, largest weight first
    float* weights;      // [T, TOP_K]
    int* counts;         // [chunks, NUM_EXPERTS] pairs; after moe_offsets: of all chunks before
    int* offsets;        // [NUM_EXPERTS + 1] an expert's first place
    int* sorted_tokens;  // [T * TOP_K] the row at a place
    int* slot;           // [T, TOP_K] the place of a pair
    int4* tiles;         // expert, first place, places, 0
    int* tile_count;
};

// For each expert the rows of this chunk that go to it, as bits.
DEVICE void clear_chunk(uint32_t* chosen) {
    for (int e = threadIdx.x; e < NUM_EXPERTS; e += blockDim.x) chosen[e] = 0;
    __syncthreads();
}

// One warp: the TOP_K largest logits of a row, largest first, the lower id first among equals, and their softmax; every
// lane gets them. (Decoding's pick_experts is made for the shortest wait of one row, this for many rows at once.)
DEVICE void choose(const float* logits, int (&ids)[TOP_K], float (&weights)[TOP_K]) {
    constexpr int PER_LANE = (NUM_EXPERTS + 31) / 32;
    int lane = threadIdx.x % 32;
    uint32_t keys[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        keys[i] = i * 32 + lane < NUM_EXPERTS ? ordered(logits[i * 32 + lane]) : 0;  // 0 is below every number
    float total = 0.f, largest = 0.f;
#pragma unroll
    for (int j = 0; j < TOP_K; j++) {
        uint32_t best = 0, id = NUM_EXPERTS - 1;  // NaN logits: any expert will do
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) best = max(best, keys[i]);
        best = __reduce_max_sync(ALL_LANES, best);
#pragma unroll
        for (int i = PER_LANE - 1; i >= 0; i--)
            if (keys[i] == best && i * 32 + lane < NUM_EXPERTS) id = i * 32 + lane;
        id = __reduce_min_sync(ALL_LANES, id);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (i * 32 + lane == id) keys[i] = 0;
        ids[j] = id;
        if (j == 0) largest = from_ordered(best);
        weights[j] = expf(from_ordered(best) - largest);
        total += weights[j];
    }
#pragma unroll
    for (int j = 0; j < TOP_K; j++) weights[j] /= total;
}

KERNEL __launch_bounds__(32 * CHUNK_ROWS) moe_route(
    const float* logits,  // [T, NUM_EXPERTS]
    const __grid_constant__ Grouping group,
    int rows) {
    __shared__ uint32_t chosen[NUM_EXPERTS];
    clear_chunk(chosen);
    wait_for_previous();
    launch_next();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * CHUNK_ROWS + warp;
    if (row < rows) {
        int ids[TOP_K];
        float weights[TOP_K];
        choose(logits + (int64_t)row * NUM_EXPERTS, ids, weights);
#pragma unroll
        for (int j = 0; j < TOP_K; j++) {
            if (lane != j % 32) continue;
            group.ids[row * TOP_K + j] = ids[j];
            group.weights[row * TOP_K + j] = weights[j];
            atomicOr(&chosen[ids[j]], 1u << warp);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < NUM_EXPERTS; e += blockDim.x)
        group.counts[blockIdx.x * NUM_EXPERTS + e] = __popc(chosen[e]);
}

// The sum of the values of all threads before this one.
DEVICE int sum_before(int value, int* totals) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        int below = __shfl_up_sync(ALL_LANES, sum, offset);
        if (lane >= offset) sum += below;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    for (int i = 0; i < warp; i++) sum += totals[i];
    __syncthreads();
    return sum - value;
}

// One block, a thread for each expert: where its pairs start, in all and of each chunk, and its tiles, of even size.
KERNEL __launch_bounds__(OFFSET_THREADS) moe_offsets(const __grid_constant__ Grouping group, int chunks) {
    constexpr int TOGETHER = 16;  // loads under way
    __shared__ int totals[32];
    wait_for_previous();
    launch_next();
    int expert = threadIdx.x, count = 0;
    if (expert < NUM_EXPERTS) {
        for (int first = 0; first < chunks; first += TOGETHER) {
            int counts[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
                counts[i] = first + i < chunks ? group.counts[(first + i) * NUM_EXPERTS + expert] : 0;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                if (first + i < chunks) group.counts[(first + i) * NUM_EXPERTS + expert] = count;
                count += counts[i];
            }
        }
    }
    int tiles = (count + TILE_PAIRS - 1) / TILE_PAIRS;
    int offset = sum_before(count, totals), first_tile = sum_before(tiles, totals);
    if (expert >= NUM_EXPERTS) return;
    group.offsets[expert] = offset;
    int size = tiles ? (count + tiles - 1) / tiles : 0;
    for (int i = 0; i < tiles; i++)
        group.tiles[first_tile + i] = make_int4(expert, offset + i * size, min(size, count - i * size), 0);
    if (expert == NUM_EXPERTS - 1) {
        group.offsets[NUM_EXPERTS] = offset + count;
        *group.tile_count = first_tile + tiles;
    }
}

KERNEL __launch_bounds__(256) moe_scatter(const __grid_constant__ Grouping group, int rows) {
    __shared__ uint32_t chosen[NUM_EXPERTS];
    clear_chunk(chosen);
    wait_for_previous();
    launch_next();
    int first = blockIdx.x * CHUNK_ROWS * TOP_K, pairs = min(CHUNK_ROWS * TOP_K, rows * TOP_K - first);
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) atomicOr(&chosen[group.ids[first + i]], 1u << i / TOP_K);
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        int expert = group.ids[first + i], row = i / TOP_K;
        int place = group.offsets[expert] + group.counts[blockIdx.x * NUM_EXPERTS + expert] +
                    __popc(chosen[expert] & ((1u << row) - 1));
        group.sorted_tokens[place] = blockIdx.x * CHUNK_ROWS + row;
        group.slot[first + i] = place;
    }
}

struct ExpertsArguments {
    const uint16_t* x;      // float16, rows of k
    const int* source;      // the row of x at a place; null: the place itself
    const int4* tiles;
    const int* tile_count;
    const uint8_t* weight;  // gated: [E, 2n, K in its format], the gates' rows, then the ups'; otherwise [E, n, K]
    const uint8_t* scale;   // NVFP4: [E, 2n or n, K / 16]
    const float* scale_2;   // NVFP4: [E, 2] or [E]
    uint16_t* out;          // float16 [T * TOP_K, n], by place
    int format;
    int k;
    int n;
    int gated;
};

// Both products of the experts. The outputs of down are float16: as float32 they would be the layer's largest traffic,
// and their rounding, 2^-12 of each term, is that of the activations which they are made from.
KERNEL __launch_bounds__(THREADS, 2) experts_prefill(const __grid_constant__ ExpertsArguments a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Tile tile;
    int features = a.gated ? TILE_ROWS / 2 : TILE_ROWS, row_tiles = (a.n + features - 1) / features;
    int index = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * features;
    // The kernel right before this one did not make the list, so it may be read before the wait.
    if (index >= *a.tile_count) {
        wait_for_previous();
        launch_next();
        return;
    }
    if (threadIdx.x == 0) {
        int4 group = a.tiles[index];
        int64_t matrix_row = (int64_t)group.x * (a.gated ? 2 * a.n : a.n) + first_row;
        int64_t bytes = row_bytes(a.format, a.k);
        tile.weight = a.weight + matrix_row * bytes;
        tile.weight_up = tile.weight + a.n * bytes;
        tile.scale = a.scale + matrix_row * (a.k / 16);
        tile.scale_up = tile.scale + (int64_t)a.n * (a.k / 16);
        tile.scale_2 = a.scale_2 + (a.gated ? 2 * group.x : group.x);
        tile.scale_2_up = tile.scale_2 + 1;
        tile.last_row = a.n - 1 - first_row;
        tile.paired = a.gated;
        tile.x = a.x;
        tile.x_rest = nullptr;
        tile.source = a.source;
        tile.first_token = group.y;
        tile.tokens = group.z;
        tile.k = a.k;
        tile.epilogue = a.gated ? (int)SWIGLU : STORE_HALF;
        tile.out = a.out + (int64_t)group.y * a.n + first_row;
        tile.out_stride = a.n;
        tile.features = min(features, a.n - first_row);
    }
    __syncthreads();
    uint8_t* shared = (uint8_t*)shared_memory;
    if (a.format == NVFP4) multiply_tile<NVFP4, 16, 32, 48, 64, 80, 96, 128>(tile, shared);
    else multiply_tile<BF16, 32, 64, 96, 128>(tile, shared);
}

// residual[t] += Σ_j weights[t, j] down[slot[t, j]] + sigmoid(shared_gate[t]) shared[t], in this order; a block for
// each row. shared null: without that term. H a multiple of 4.
KERNEL __launch_bounds__(COMBINE_THREADS) moe_combine(
    float* residual,                          // [T, H]
    const uint16_t* down,                     // float16 [T * TOP_K, H]
    const __grid_constant__ Grouping group,
    const float* shared,                      // [T, H]
    const float* shared_gate,                 // [T], elements shared_gate_stride apart
    int shared_gate_stride,
    int h) {
    wait_for_previous();
    launch_next();
    int row = blockIdx.x;
    const uint16_t* terms[TOP_K];
    float weights[TOP_K];
#pragma unroll
    for (int j = 0; j < TOP_K; j++) {
        terms[j] = down + (int64_t)group.slot[row * TOP_K + j] * h;
        weights[j] = group.weights[row * TOP_K + j];
    }
    float gate = shared ? sigmoid(shared_gate[(int64_t)row * shared_gate_stride]) : 0.f;
    for (int i = threadIdx.x; i < h / 4; i += COMBINE_THREADS) {
        int64_t at = (int64_t)row * (h / 4) + i;
        float4 sum = {0.f, 0.f, 0.f, 0.f}, old = ((const float4*)residual)[at], always = {0.f, 0.f, 0.f, 0.f};
        if (shared) always = ((const float4*)shared)[at];
#pragma unroll
        for (int j = 0; j < TOP_K; j++) {
            uint2 v = ((const uint2*)terms[j])[i];
            sum.x += weights[j] * half_low(v.x), sum.y += weights[j] * half_high(v.x);
            sum.z += weights[j] * half_low(v.y), sum.w += weights[j] * half_high(v.y);
        }
        old.x += sum.x + gate * always.x, old.y += sum.y + gate * always.y;
        old.z += sum.z + gate * always.z, old.w += sum.w + gate * always.w;
        ((float4*)residual)[at] = old;
    }
}

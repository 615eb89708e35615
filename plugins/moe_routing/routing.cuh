// Routing on the device: the block that finishes the last tile of router logits picks every row's experts and makes
// the list of distinct experts that the experts' kernels go through. Op: MoeRouting.
#pragma once
#include "common.cuh"

#ifndef TOP_K
#define TOP_K 8
#endif
#ifndef NUM_EXPERTS
#define NUM_EXPERTS 256
#endif
constexpr int ROUTED_ROWS = 8;
constexpr int MAX_ITEMS = ROUTED_ROWS * TOP_K;

// What the experts' kernels read.
struct Routing {
    int count;                            // of distinct experts
    int expert[MAX_ITEMS];                // in order of first appearance
    int slot[MAX_ITEMS][ROUTED_ROWS];     // place of this expert among a row's, or -1
    int item[ROUTED_ROWS][TOP_K];         // the reverse: a row's experts as places in `expert`
    float weight[ROUTED_ROWS][TOP_K];
};

struct RoutingArguments {
    const float* logits;  // [T, NUM_EXPERTS]
    Routing* routing;
    int* counter;         // zero between launches
};

// A float's bits as an unsigned integer of the same order.
DEVICE uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float from_ordered(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// One warp: the TOP_K largest logits of a row, largest first, the lower id first among equals, and their softmax.
DEVICE void pick_experts(const float* logits, int (&ids)[TOP_K], float (&weights)[TOP_K]) {
    constexpr int PER_LANE = (NUM_EXPERTS + 31) / 32;
    int lane = threadIdx.x & 31;
    uint32_t keys[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int expert = i * 32 + lane;
        keys[i] = expert < NUM_EXPERTS ? ordered(__ldcg(logits + expert)) : 0;  // 0 is below every number
    }
    float total = 0.f, largest = 0.f;
#pragma unroll
    for (int j = 0; j < TOP_K; j++) {
        uint32_t best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) best = max(best, keys[i]);
        best = __reduce_max_sync(ALL_LANES, best);
        uint32_t id = NUM_EXPERTS;
#pragma unroll
        for (int i = PER_LANE - 1; i >= 0; i--)
            if (keys[i] == best && i * 32 + lane < NUM_EXPERTS) id = i * 32 + lane;
        id = __reduce_min_sync(ALL_LANES, id);
        id = min(id, (uint32_t)NUM_EXPERTS - 1);  // NaN logits: any expert will do
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (i * 32 + lane == id) keys[i] = 0;
        float logit = from_ordered(best);
        if (j == 0) largest = logit;
        ids[j] = id;
        weights[j] = expf(logit - largest);
        total += weights[j];
    }
#pragma unroll
    for (int j = 0; j < TOP_K; j++) weights[j] /= total;
}

// Called by all threads of a block after it wrote a tile of logits; `tiles` such calls make up a launch.
DEVICE void route_when_last(const RoutingArguments& a, int rows, int tiles) {
    __shared__ bool is_last;
    __shared__ int ids[MAX_ITEMS];
    __shared__ int first[MAX_ITEMS];  // pair -> the earliest pair with the same expert
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(a.counter, 1) == tiles - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    int lane = threadIdx.x & 31, row = threadIdx.x >> 5;
    if (row < rows) {
        int picked[TOP_K];
        float weights[TOP_K];
        pick_experts(a.logits + row * NUM_EXPERTS, picked, weights);
#pragma unroll
        for (int j = 0; j < TOP_K; j++)
            if (lane == j) ids[row * TOP_K + j] = picked[j], a.routing->weight[row][j] = weights[j];
    }
    __syncthreads();
    int pairs = rows * TOP_K, pair = threadIdx.x;
    if (pair < pairs) {
        int earliest = 0;
        while (ids[earliest] != ids[pair]) earliest++;
        first[pair] = earliest;
    }
    __syncthreads();
    if (pair < pairs) {
        int place = 0;  // of this pair's expert in the list
        for (int i = 0; i < first[pair]; i++) place += first[i] == i;
        a.routing->item[pair / TOP_K][pair % TOP_K] = place;
        if (first[pair] == pair) {
            a.routing->expert[place] = ids[pair];
            for (int t = 0; t < rows; t++) {
                int slot = -1;
                for (int j = 0; j < TOP_K; j++)
                    if (ids[t * TOP_K + j] == ids[pair]) slot = j;
                a.routing->slot[place][t] = slot;
            }
        }
        if (pair == pairs - 1) {
            int count = 0;
            for (int i = 0; i < pairs; i++) count += first[i] == i;
            a.routing->count = count;
            *a.counter = 0;
        }
    }
}

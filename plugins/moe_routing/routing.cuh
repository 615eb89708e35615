// Routing on the device: every block of the experts' kernels picks each row's experts from the router's logits itself,
// and makes the list of distinct experts: that takes less time than to wait for one block to do it. Op: MoeRouting.
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

// A block's copy of what its rows chose, in shared memory.
struct Chosen {
    int count;                             // of distinct experts
    int expert[MAX_ITEMS];                 // in order of first appearance
    signed char slot[MAX_ITEMS][ROUTED_ROWS];  // place of this expert among a row's, or -1
    int ids[MAX_ITEMS];                    // [row, place]
    float weight[ROUTED_ROWS][TOP_K];
    int earliest[NUM_EXPERTS];             // pair that chose an expert
};

// A float's bits as an unsigned integer of the same order.
DEVICE uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float from_ordered(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

constexpr int KEYS =  // of a lane
    NUM_EXPERTS <= 32 ? 1 : NUM_EXPERTS <= 64 ? 2 : NUM_EXPERTS <= 128 ? 4 : NUM_EXPERTS <= 256 ? 8 : 16;
static_assert(NUM_EXPERTS <= 512 && MAX_ITEMS <= 64, "more experts than a lane has keys, or a warp pairs");

// Neighbours take turns: descending.
DEVICE void sort_keys(uint32_t (&key)[KEYS]) {
#pragma unroll
    for (int turn = 0; turn < KEYS; turn++)
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            constexpr int LAST = KEYS - 1;
            int j = 2 * i + turn % 2;
            if (j == LAST) continue;
            uint32_t a = key[j], b = key[j + 1];
            key[j] = max(a, b), key[j + 1] = min(a, b);
        }
}

// One warp, slowly: the TOP_K largest keys, the lower id first among equals.
DEVICE void pick_among_equals(uint32_t (&keys)[KEYS], int* ids, uint32_t (&best)[TOP_K]) {
    int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int j = 0; j < TOP_K; j++) {
        uint32_t most = 0, id = NUM_EXPERTS;
#pragma unroll
        for (int i = 0; i < KEYS; i++) most = max(most, keys[i]);
        most = __reduce_max_sync(ALL_LANES, most);
#pragma unroll
        for (int i = KEYS - 1; i >= 0; i--)
            if (keys[i] == most && i * 32 + lane < NUM_EXPERTS) id = i * 32 + lane;
        id = min(__reduce_min_sync(ALL_LANES, id), (uint32_t)NUM_EXPERTS - 1);
#pragma unroll
        for (int i = 0; i < KEYS; i++)
            if (i * 32 + lane == id) keys[i] = 0;
#pragma unroll
        for (int i = 0; i < TOP_K; i++)
            if (i == j) best[i] = most;
        if (lane == 0) ids[j] = id;
    }
}

// A lane's logits of a row, as loaded (nothing waits for them yet), then as keys of the same order, 0 being below every
// number. best: the chosen keys, in every lane.
struct Keys {
    float logit[KEYS];
    uint32_t key[KEYS], best[TOP_K];
    DEVICE void load(const float* logits) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            int expert = i * 32 + (threadIdx.x & 31);
            logit[i] = expert < NUM_EXPERTS ? __ldcg(logits + expert) : 0.f;
        }
    }
    DEVICE void order() {
#pragma unroll
        for (int i = 0; i < KEYS; i++) key[i] = i * 32 + (threadIdx.x & 31) < NUM_EXPERTS ? ordered(logit[i]) : 0;
    }
    // The softmax of the best.
    DEVICE void weigh(float* weights) const {
        int lane = threadIdx.x & 31;
        uint32_t own = best[0];
#pragma unroll
        for (int j = 1; j < TOP_K; j++) own = lane == j ? best[j] : own;
        float weight = lane < TOP_K ? __expf(from_ordered(own) - from_ordered(best[0])) : 0.f;
        float total = warp_sum(weight);
        if (lane < TOP_K) weights[lane] = __fdividef(weight, total);
    }
};

// One warp: the ids of the TOP_K largest logits of a row, largest first, the lower id first among equals.
DEVICE void pick_experts(Keys& keys, int* ids) {
    int lane = threadIdx.x & 31;
    keys.order();
    uint32_t(&key)[KEYS] = keys.key;
    uint32_t(&best)[TOP_K] = keys.best;
    uint32_t sorted[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++) sorted[i] = key[i];
    sort_keys(sorted);
    bool distinct = true;
#pragma unroll
    for (int j = 0; j < TOP_K; j++) {  // the largest of the lanes' largest, whose lane then offers its next
        best[j] = __reduce_max_sync(ALL_LANES, sorted[0]);
        if (sorted[0] == best[j]) {
#pragma unroll
            for (int i = 0; i < KEYS; i++) sorted[i] = i + 1 < KEYS ? sorted[i + 1] : 0;
        }
        if (j) distinct = distinct && best[j] < best[j - 1];
    }
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) count += key[i] >= best[TOP_K - 1];
    if (distinct && __reduce_add_sync(ALL_LANES, count) == TOP_K) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            if (key[i] < best[TOP_K - 1]) continue;
            int place = 0;
#pragma unroll
            for (int j = 0; j < TOP_K; j++) place += best[j] > key[i];
            ids[place] = i * 32 + lane;
        }
    } else {  // equals were taken together
        pick_among_equals(key, ids, best);
    }
}

// Called by all threads of a block of at least ROUTED_ROWS warps. keys: of row `warp`, in the warps below `rows`.
DEVICE void choose_experts(Chosen& chosen, Keys& keys, int rows) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (warp < rows) pick_experts(keys, chosen.ids + warp * TOP_K);
    if (rows == 1) {
        if (warp == 0) {
            __syncwarp();
            if (lane < TOP_K) chosen.expert[lane] = chosen.ids[lane], chosen.slot[lane][0] = lane;
            if (lane == 0) chosen.count = TOP_K;
        }
        __syncthreads();
        return;
    }
    uint32_t* slots = (uint32_t*)chosen.slot;
    for (int i = threadIdx.x; i < MAX_ITEMS * ROUTED_ROWS / 4; i += blockDim.x) slots[i] = 0xffffffffu;
    for (int i = threadIdx.x; i < NUM_EXPERTS; i += blockDim.x) chosen.earliest[i] = MAX_ITEMS;
    __syncthreads();
    if (warp == 0) {  // two pairs a lane, 32 apart
        int pairs = rows * TOP_K, earliest[2];
        uint32_t firsts[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (h * 32 + lane < pairs) atomicMin(&chosen.earliest[chosen.ids[h * 32 + lane]], h * 32 + lane);
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int pair = h * 32 + lane;
            earliest[h] = pair < pairs ? chosen.earliest[chosen.ids[pair]] : -1;
            firsts[h] = __ballot_sync(ALL_LANES, earliest[h] == pair);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int pair = h * 32 + lane, e = earliest[h];
            if (pair >= pairs) continue;
            int place = __popc(firsts[0] & (e < 32 ? (1u << e) - 1 : ALL_LANES));
            if (e > 32) place += __popc(firsts[1] & ((1u << (e - 32)) - 1));
            if (e == pair) chosen.expert[place] = chosen.ids[pair];
            chosen.slot[place][pair / TOP_K] = pair % TOP_K;
        }
        if (lane == 0) chosen.count = __popc(firsts[0]) + __popc(firsts[1]);
    }
    __syncthreads();
}

// The best entry of a row of logits: what sampling and the lm_head's own argmax share.
#pragma once
#include "common.cuh"

typedef unsigned long long Wide;  // what 64-bit atomics take

constexpr int MAX_OUTPUTS = 3;
constexpr float LARGEST = 3.402823466e38f;  // of the finite floats
constexpr int BINS = 2048;

// A row's part of the scratch memory: zeros, but for what says otherwise, before every launch and after it.
struct Row {
    Wide best;         // (rank, ~index) of the best entry yet
    Wide sure_mass;    // of bins before `first`. These and what follows go from a kernel to the next.
    Wide window_mass;  // of all bins
    float maximum;         // largest logit
    int first, last;       // bins before `first` pass top_k and top_p, bins after `last` do not
    uint32_t keep;         // how many from `first` on pass top_k; 0: all
    uint32_t arrived;      // blocks, in this launch
    uint32_t listed;       // entries of bins `first` to `last`
    uint32_t claimed;      // groups of tiles of an lm_head, in this launch
    uint32_t padding[2];
    Wide mass[BINS];
    uint32_t count[BINS];
};
static_assert(sizeof(Row) == 64 + 12 * BINS, "cuda.py allocates this");

// Behind each Row lie the [V] places of its list.
DEVICE Row& row_at(uint8_t* scratch, int vocab, int row) {
    return *(Row*)(scratch + row * (sizeof(Row) + vocab * sizeof(Wide)));
}

// Floats in the order of unsigned integers; -0 is 0.
DEVICE uint32_t to_ordered(float value) {
    uint32_t bits = __float_as_uint(value + 0.f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The order of entries: by score, all below a logit that is no number or +infinity, all above one that is -infinity.
DEVICE uint32_t rank_of(float logit, float score) {
    if (!(logit <= LARGEST)) return 0xffffffffu;
    return logit < -LARGEST ? 0 : to_ordered(score);
}
DEVICE bool is_valid(uint32_t rank) { return rank != 0 && rank != 0xffffffffu; }

struct Best {
    uint32_t rank = 0, index = 0;
    // Entries come to a thread in rising order, so that of equals the first stays.
    DEVICE void offer(uint32_t other, uint32_t its_index) {
        if (other > rank) rank = other, index = its_index;
    }
    DEVICE Wide packed() const { return rank ? (Wide)rank << 32 | (uint32_t)~index : 0; }
};

struct Tokens {
    int* out[MAX_OUTPUTS];  // [T] each, or null: where row t's token goes
};

// Whether this block is the last of its row: then it sees what all of them wrote.
DEVICE bool is_last_block(Row& row) {
    __shared__ int last;
    __syncthreads();
    if (threadIdx.x == 0) {  // whose fences, beside a barrier, hold for the block
        __threadfence();
        last = atomicAdd(&row.arrived, 1u) == gridDim.x - 1;
        if (last) row.arrived = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// One thread of the last block: hand out the best entry of row t. Returns its rank.
DEVICE uint32_t write_token(Row& row, const Tokens& tokens, int* error, int t) {
    Wide best = atomicExch(&row.best, 0ull);
    uint32_t rank = (uint32_t)(best >> 32);
    if (!is_valid(rank)) *error = 1;
#pragma unroll
    for (int i = 0; i < MAX_OUTPUTS; ++i)
        if (tokens.out[i]) tokens.out[i][t] = is_valid(rank) ? (int)~(uint32_t)best : 0;
    return rank;
}

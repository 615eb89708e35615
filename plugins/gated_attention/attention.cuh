// What decode.cu and prefill.cu share: the layout of the cache, the norm and RoPE of a head's row, tiles in shared memory.
//
// Macros: HEAD_DIM (a multiple of 16, to 256), NUM_HEADS, NUM_KV_HEADS, ROTARY_DIM, KV_FP8 (the cache holds E4M3
// codes that are the values themselves, else float16).
#pragma once
#include "common.cuh"

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;     // query heads of a KV head
constexpr int HALF = ROTARY_DIM / 2;                // RoPE turns the pairs (i, i + HALF)
constexpr int TILE = 64;                            // cache slots held at once
constexpr int STEPS = HEAD_DIM / 16;                // of a product over HEAD_DIM
constexpr int CACHE_ROW = HEAD_DIM * (KV_FP8 ? 1 : 2);                // bytes
constexpr int PAIRS = (HEAD_DIM / 2 + 31) / 32;     // of a row over a warp: pair p of elements lies at lane p % 32
constexpr int TURNED = (ROTARY_DIM / 2 + 31) / 32;  // those that RoPE may touch
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256 && NUM_HEADS % NUM_KV_HEADS == 0 && GROUP <= 16, "sizes");

// ---- the cache: [2, Hkv, S, D], keys, then values ----------------------------------------------------------------

enum Which : int { KEYS = 0, VALUES = 1 };

DEVICE char* cache_rows(void* cache, Which which, int kv_head, int capacity) {
    return (char*)cache + (int64_t)(which * NUM_KV_HEADS + kv_head) * capacity * CACHE_ROW;
}

// Two neighbours as the cache holds them, to `pair` places after `row`.
DEVICE void store_pair(char* row, int pair, uint32_t code) {
    if (KV_FP8)
        ((uint16_t*)row)[pair] = (uint16_t)code;
    else
        ((uint32_t*)row)[pair] = code;
}
DEVICE uint32_t encode(const float (&x)[2]) {
    if (KV_FP8) return to_e4m3(x[0]) | to_e4m3(x[1]) << 8;
    return to_half2(clamp_half(x[0]), clamp_half(x[1]));
}

// ---- a head's row, spread over a warp ----------------------------------------------------------------------------

struct HeadRow {
    float value[PAIRS][2];
    float partner[TURNED][2];  // the other element of a RoPE pair
};

DEVICE void load_pairs(float (&value)[PAIRS][2], const float* x) {
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        int pair = (threadIdx.x & 31) + 32 * j;
        float2 both = make_float2(0.f, 0.f);
        if (HEAD_DIM % 64 == 0 || pair < HEAD_DIM / 2) both = *(const float2*)(x + 2 * pair);
        value[j][0] = both.x, value[j][1] = both.y;
    }
}

DEVICE void load_row(HeadRow& row, const float* x) {
    load_pairs(row.value, x);
#pragma unroll
    for (int j = 0; j < TURNED; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int d = 2 * ((threadIdx.x & 31) + 32 * j) + e;
            row.partner[j][e] = d < ROTARY_DIM ? x[d < HALF ? d + HALF : d - HALF] : 0.f;
        }
}

// cos and sin of a position, for each RoPE pair, by `threads` threads that count from `thread`.
DEVICE void fill_turns(float2* turns, const float* inverse_frequencies, int position, int thread, int threads) {
    for (int i = thread; i < HALF; i += threads) {
        float sine, cosine;
        sincosf(__fmul_rn((float)position, inverse_frequencies[i]), &sine, &cosine);
        turns[i] = make_float2(cosine, sine);
    }
}

// RMS norm with a zero-centred weight, then RoPE. Leaves the result in row.value. Each rounding is spelled out, so that
// all kernels give the same bits.
DEVICE void norm_and_turn(HeadRow& row, const HeadRow& weight, const float2* turns, float epsilon) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) sum = fmaf(row.value[j][e], row.value[j][e], sum);
    float factor = rsqrtf(fmaf(warp_sum(sum), 1.f / HEAD_DIM, epsilon));
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float normed = row.value[j][e] * factor * (1.f + weight.value[j][e]);
            int d = 2 * ((threadIdx.x & 31) + 32 * j) + e;
            if (j < TURNED && d < ROTARY_DIM) {
                float partner = row.partner[j][e] * factor * (1.f + weight.partner[j][e]);
                float2 turn = turns[d < HALF ? d : d - HALF];
                normed = fmaf(normed, turn.x, __fmul_rn(partner, d < HALF ? -turn.y : turn.y));
            }
            row.value[j][e] = normed;
        }
}

// ---- tiles in shared memory --------------------------------------------------------------------------------------
// Rows of ROW_BYTES in chunks of 16 bytes, placed so that eight rows' chunks of one column lie in different banks.

constexpr int tile_stride(int row_bytes) { return row_bytes % 128 ? row_bytes + 16 : row_bytes; }
constexpr int tile_bytes(int row_bytes) { return TILE * tile_stride(row_bytes); }

template <int ROW_BYTES>
DEVICE int tile_offset(int row, int chunk) {
    return row * tile_stride(ROW_BYTES) + (ROW_BYTES % 128 ? chunk : chunk ^ (row & 7)) * 16;
}

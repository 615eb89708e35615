// A tile of 64 cache slots in decode.cu: into shared memory, times queries, softmax, times values.
//
// The products have cache slots or elements of the values as the rows of the tensor core instruction and (row, head)
// pairs as its columns. Queries and softmax weights are two halves each, the rounded value and the rest, so that the
// cache's own rounding is the only one to speak of.
#pragma once
#include "gated_attention/attention.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int MAX_ROWS = 8;
constexpr int SCORE_STRIDE = TILE + 4;  // floats; keeps the columns of a warp's lanes in different banks
constexpr int MIX_STEPS = (STEPS + WARPS - 1) / WARPS;
constexpr int TILE_BYTES = tile_bytes(CACHE_ROW);

// Scores are base 2 logarithms.
struct Softmax {
    float largest;
    float sum;  // of 2^(score - largest)
};

// Joins two parts of a row's softmax. Returns the factors of what had been summed up, and of the part.
DEVICE float2 join(Softmax& all, Softmax part) {
    float largest = fmaxf(all.largest, part.largest);
    float2 factor = make_float2(exp2_fast(all.largest - largest), exp2_fast(part.largest - largest));
    all.sum = fmaf(part.sum, factor.y, all.sum * factor.x);
    all.largest = largest;
    return factor;
}
DEVICE Softmax empty_softmax() { return {__uint_as_float(0xff800000u), 0.f}; }

// Dynamic shared memory, by byte offsets. C: columns rounded up to eights.
template <int QUERIES>
struct Layout {
    static constexpr int COLUMNS = QUERIES * GROUP, EIGHTS = (COLUMNS + 7) / 8;
    static constexpr int OWN = (COLUMNS + WARPS - 1) / WARPS;                     // columns of a warp
    static constexpr int QUERY = 2 * TILE_BYTES;                                  // fragments [STEPS, C / 8, 32]
    static constexpr int WEIGHTS = QUERY + STEPS * EIGHTS * 512;                  // fragments [4, C / 8, 32]
    static constexpr int SCORES = WEIGHTS + TILE / 16 * EIGHTS * 512;             // [2, C, SCORE_STRIDE]
    static constexpr int FACTORS = SCORES + 2 * EIGHTS * 8 * SCORE_STRIDE * 4;    // float2 [C]
    static constexpr int TURNS = FACTORS + EIGHTS * 8 * 8;                        // float2 [MAX_ROWS, HALF]
};

// ---- into shared memory ------------------------------------------------------------------------------------------

// The slots of a tile before `first`; zeros from `end` on, so that nothing found there gets into a product. Between
// the two append_rows writes.
DEVICE void load_tile(char* tile, const char* rows, int start, int first, int end) {
    constexpr int CHUNKS = CACHE_ROW / 16;
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS, slot = start + row;
        char* place = tile + tile_offset<CACHE_ROW>(row, chunk);
        if (slot < first)
            copy_async16(place, rows + (int64_t)slot * CACHE_ROW + chunk * 16, true);
        else if (slot >= end)
            *(uint4*)place = make_uint4(0, 0, 0, 0);
    }
}

// One query as a column of the B operand, scaled. Element d of a step's 16 stands where load_keys has that of a key.
template <int EIGHTS>
DEVICE void put_query(char* fragments, int column, const HeadRow& row, float scale) {
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int d = 2 * ((threadIdx.x & 31) + 32 * j) + e, i = d % 16;
            if (HEAD_DIM % 64 && d >= HEAD_DIM) continue;
            int lane = KV_FP8 ? i / 4 : i % 8 / 2, word = KV_FP8 ? i % 2 : i / 8, half = KV_FP8 ? i % 4 / 2 : i % 2;
            int fragment = (d / 16 * EIGHTS + column / 8) * 32 + column % 8 * 4 + lane;
            float value = __fmul_rn(row.value[j][e], scale);
            uint16_t rounded = to_half(value);
            uint16_t* place = (uint16_t*)fragments + fragment * 8 + word * 2 + half;
            place[0] = rounded;
            place[4] = to_half(value - half_to_float(rounded));
        }
}

// ---- products ----------------------------------------------------------------------------------------------------

// A operand: 16 keys from `row`, the 16 elements of a step. Of E4M3 a matrix of 16-bit elements holds the whole step;
// a word's bytes 0 and 2 then count as the elements of the first eight, 1 and 3 as those of the second.
DEVICE void load_keys(uint32_t (&a)[4], const char* tile, int row, int step) {
    int lane = threadIdx.x & 31;
    row += lane % 16;
    if (KV_FP8) {
        uint32_t words[2];
        load_matrix_x2(words, tile + tile_offset<CACHE_ROW>(row, step));
        a[0] = e4m3_even_half2(words[0]), a[1] = e4m3_even_half2(words[1]);
        a[2] = e4m3_odd_half2(words[0]), a[3] = e4m3_odd_half2(words[1]);
    } else {
        load_matrix_x4(a, tile + tile_offset<CACHE_ROW>(row, step * 2 + lane / 16));
    }
}

// A operand: 16 elements of the values from element 16 * step, the 16 slots from `row`. Of E4M3 row g is element 2g
// and row g + 8 is element 2g + 1.
DEVICE void load_values(uint32_t (&a)[4], const char* tile, int row, int step) {
    int lane = threadIdx.x & 31;
    if (KV_FP8) {
        uint32_t words[2];
        load_matrix_x2_transposed(words, tile + tile_offset<CACHE_ROW>(row + lane % 16, step));
        a[0] = e4m3_even_half2(words[0]), a[1] = e4m3_odd_half2(words[0]);
        a[2] = e4m3_even_half2(words[1]), a[3] = e4m3_odd_half2(words[1]);
    } else {
        row += lane % 8 + lane / 16 * 8;
        load_matrix_x4_transposed(a, tile + tile_offset<CACHE_ROW>(row, step * 2 + lane / 8 % 2));
    }
}

// Scores of a tile in two sums, each over one half of HEAD_DIM: [2, C, SCORE_STRIDE].
template <int EIGHTS>
DEVICE void score_tile(float* scores, const char* keys, const uint4* queries) {
    constexpr int HALF_STEPS = (STEPS + 1) / 2;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, row = warp % 4 * 16, part = warp / 4;
    float rounded[EIGHTS][4] = {}, rest[EIGHTS][4] = {};
#pragma unroll
    for (int i = 0; i < HALF_STEPS; i++) {
        int step = part * HALF_STEPS + i;
        if (STEPS % 2 && step >= STEPS) continue;
        uint32_t a[4];
        load_keys(a, keys, row, step);
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            uint4 b = queries[(step * EIGHTS + n) * 32 + lane];
            mma_half(rounded[n], a, b.x, b.y);
            mma_half(rest[n], a, b.z, b.w);
        }
    }
    float* out = scores + (part * EIGHTS * 8 + lane % 4 * 2) * SCORE_STRIDE + row + lane / 4;
#pragma unroll
    for (int n = 0; n < EIGHTS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[(n * 8 + i % 2) * SCORE_STRIDE + i / 2 * 8] = rounded[n][i] + rest[n][i];
}

// The softmax of a tile, column by column: its weights as the B operand of mix_tile, and the factors that join it to
// `all`. first_query: position of the column's row 0.
template <int QUERIES>
DEVICE void weigh_tile(char* shared, Softmax (&all)[Layout<QUERIES>::OWN], int start, int first_query) {
    using L = Layout<QUERIES>;
    int lane = threadIdx.x & 31, slot = 2 * lane;
#pragma unroll
    for (int i = 0; i < L::OWN; i++) {
        int column = threadIdx.x / 32 + i * WARPS;
        if (L::COLUMNS % WARPS && column >= L::COLUMNS) break;
        int visible = first_query + column / GROUP - start;  // the last slot that the row sees
        const float* scores = (const float*)(shared + L::SCORES) + column * SCORE_STRIDE + slot;
        float2 a = *(const float2*)scores, b = *(const float2*)(scores + L::EIGHTS * 8 * SCORE_STRIDE);
        float2 score = make_float2(a.x + b.x, a.y + b.y);
        if (slot > visible) score.x = __uint_as_float(0xff800000u);
        if (slot + 1 > visible) score.y = __uint_as_float(0xff800000u);
        Softmax part;
        part.largest = warp_max(fmaxf(score.x, score.y));
        float base = visible < 0 ? 0.f : part.largest;
        score = make_float2(exp2_fast(score.x - base), exp2_fast(score.y - base));
        part.sum = warp_sum(score.x + score.y);
        float2 factor = make_float2(1.f, 0.f);
        if (visible >= 0) factor = join(all[i], part);
        if (lane == 0) ((float2*)(shared + L::FACTORS))[column] = factor;
        uint32_t rounded = to_half2(score.x, score.y);
        int fragment = (lane / 8 * L::EIGHTS + column / 8) * 32 + column % 8 * 4 + lane % 4;
        uint32_t* place = (uint32_t*)(shared + L::WEIGHTS) + fragment * 4 + lane % 8 / 4;
        place[0] = rounded;
        place[2] = to_half2(score.x - half_low(rounded), score.y - half_high(rounded));
    }
}

// sums = sums * factor + weights v * factor, transposed: a warp has the elements 16 (warp + 8 i) to + 15.
template <int EIGHTS>
DEVICE void mix_tile(float (&sums)[MIX_STEPS][EIGHTS][4], const char* values, const uint4* weights, const float4* factors) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < MIX_STEPS; i++) {
        int step = threadIdx.x / 32 + i * WARPS;
        if (STEPS % WARPS && step >= STEPS) break;
        float tile[EIGHTS][4] = {};
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            uint32_t a[4];
            load_values(a, values, k * 16, step);
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
                uint4 b = weights[(k * EIGHTS + n) * 32 + lane];
                mma_half(tile[n], a, b.x, b.y);
                mma_half(tile[n], a, b.z, b.w);
            }
        }
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            float4 factor = factors[n * 4 + lane % 4];  // of two columns
#pragma unroll
            for (int j = 0; j < 4; j++)
                sums[i][n][j] = j % 2 ? fmaf(tile[n][j], factor.w, sums[i][n][j] * factor.z)
                                      : fmaf(tile[n][j], factor.y, sums[i][n][j] * factor.x);
        }
    }
}

// Gated attention of many rows: attention_append writes their keys and values, attention_prefill attends over the cache.
// plugins/gated_attention/__init__.py has the math.
//
// A block has the query heads of one KV head at as many rows as give 64 queries, and goes through the cache tile by
// tile from slot 0: the bits of a row depend on its position alone. A warp has 16 queries and all of HEAD_DIM.
#include "gated_attention/attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int TOKENS = 16 * WARPS / GROUP;     // rows of a block; queries (token, head), heads first
constexpr int ROW_BYTES = 2 * HEAD_DIM;        // in shared memory, always float16
constexpr int TILE_BYTES = tile_bytes(ROW_BYTES);
constexpr int VALUE_STEPS = HEAD_DIM / 8;      // of a warp's sums, eight columns each
constexpr int QUERY_BATCH = 4;                 // rows that a warp loads at once

// ---- append ------------------------------------------------------------------------------------------------------

struct AppendArguments {
    const float* k;                    // row t at t * k_stride: [Hkv, D]
    const float* v;
    const float* k_norm;               // [D], zero-centred
    const float* inverse_frequencies;  // [ROTARY_DIM / 2]
    const int* position;               // row t stands at *position + position_offset + t
    void* kv_cache;                    // [2, Hkv, S, D]
    int k_stride;
    int v_stride;
    int position_offset;
    int capacity;                      // S
    float epsilon;
    int padding;
};

// Grid (T), a warp for each KV head.
KERNEL __launch_bounds__(32 * NUM_KV_HEADS) attention_append(const __grid_constant__ AppendArguments a) {
    __shared__ float2 turns[HALF];
    int row = blockIdx.x, kv_head = threadIdx.x / 32, position = *a.position + a.position_offset + row;
    fill_turns(turns, a.inverse_frequencies, position, threadIdx.x, blockDim.x);
    HeadRow key, weight;
    float value[PAIRS][2];
    load_row(weight, a.k_norm);
    wait_for_previous();
    launch_next();
    load_row(key, a.k + (int64_t)row * a.k_stride + kv_head * HEAD_DIM);
    load_pairs(value, a.v + (int64_t)row * a.v_stride + kv_head * HEAD_DIM);
    __syncthreads();
    norm_and_turn(key, weight, turns, a.epsilon);
    int64_t slot = (int64_t)position * CACHE_ROW;
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        int pair = threadIdx.x % 32 + 32 * j;
        if (HEAD_DIM % 64 && pair >= HEAD_DIM / 2) continue;
        store_pair(cache_rows(a.kv_cache, KEYS, kv_head, a.capacity) + slot, pair, encode(key.value[j]));
        store_pair(cache_rows(a.kv_cache, VALUES, kv_head, a.capacity) + slot, pair, encode(value[j]));
    }
}

// ---- attention ---------------------------------------------------------------------------------------------------

struct PrefillArguments {
    const float* q_gate;               // row t at t * q_stride: [Hq, 2, D], query and gate of each head
    const float* q_norm;               // [D], zero-centred
    const float* inverse_frequencies;  // [ROTARY_DIM / 2]
    const int* position;               // row t stands at *position + position_offset + t
    void* kv_cache;                    // [2, Hkv, S, D], with the rows' own keys and values
    uint16_t* y;                       // float16 [T, Hq, D]
    int q_stride;
    int position_offset;
    int capacity;                      // S
    int rows;                          // T
    float epsilon;
    int padding;
};

// The block's queries as float16 [64, D], scaled so that scores are base 2 logarithms; zeros where there is none.
DEVICE void put_queries(const PrefillArguments& a, char* shared, const float2* turns, const HeadRow& weight,
                        int first_token, int kv_head) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    for (int batch = 0; batch < 16; batch += QUERY_BATCH) {
        HeadRow query[QUERY_BATCH];
#pragma unroll
        for (int i = 0; i < QUERY_BATCH; i++) {
            int row = warp * 16 + batch + i, token = min(min(row / GROUP, TOKENS - 1), a.rows - 1 - first_token);
            int head = kv_head * GROUP + row % GROUP;
            load_row(query[i], a.q_gate + (int64_t)(first_token + token) * a.q_stride + head * 2 * HEAD_DIM);
        }
#pragma unroll
        for (int i = 0; i < QUERY_BATCH; i++) {
            int row = warp * 16 + batch + i, token = row / GROUP;
            bool exists = token < TOKENS && first_token + token < a.rows;
            norm_and_turn(query[i], weight, turns + min(token, TOKENS - 1) * HALF, a.epsilon);
            float scale = exists ? LOG2_E / sqrtf((float)HEAD_DIM) : 0.f;
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                int pair = lane + 32 * j;
                if (HEAD_DIM % 64 && pair >= HEAD_DIM / 2) continue;
                uint32_t both = to_half2(query[i].value[j][0] * scale, query[i].value[j][1] * scale);
                *(uint32_t*)(shared + tile_offset<ROW_BYTES>(row, pair / 4) + pair % 4 * 4) = both;
            }
        }
    }
}

// The slots of a tile before `end`, and zeros: nothing that lies behind may get into a product.
DEVICE void load_tile(char* tile, const char* rows, int start, int end) {
    constexpr int CHUNKS = CACHE_ROW / 16;
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = start + row < end;
        const char* from = rows + (int64_t)(start + row) * CACHE_ROW + chunk * 16;
        if (KV_FP8) {
            uint4 codes = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
            uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w}, halves[8];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                uint32_t even = e4m3_even_half2(words[w]), odd = e4m3_odd_half2(words[w]);
                halves[2 * w] = (even & 0xffffu) | odd << 16;
                halves[2 * w + 1] = even >> 16 | (odd & 0xffff0000u);
            }
            *(uint4*)(tile + tile_offset<ROW_BYTES>(row, 2 * chunk)) = make_uint4(halves[0], halves[1], halves[2], halves[3]);
            *(uint4*)(tile + tile_offset<ROW_BYTES>(row, 2 * chunk + 1)) =
                make_uint4(halves[4], halves[5], halves[6], halves[7]);
        } else {
            copy_async16(tile + tile_offset<ROW_BYTES>(row, chunk), from, valid);
        }
    }
}

// A warp's scores [16, 64].
DEVICE void score_tile(float (&scores)[TILE / 8][4], const char* queries, const char* keys) {
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[n][i] = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint32_t a[4], b[4];
        load_matrix_x4(a, queries + tile_offset<ROW_BYTES>(warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < TILE / 16; n++) {
            int row = n * 16 + lane % 8 + lane / 16 * 8;
            load_matrix_x4(b, keys + tile_offset<ROW_BYTES>(row, step * 2 + lane / 8 % 2));
            mma_half(scores[2 * n], a, b[0], b[1]);
            mma_half(scores[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// sums [16, D] += weights [16, 64] values [64, D], the weights rounded to float16.
DEVICE void mix_tile(float (&sums)[VALUE_STEPS][4], const float (&weights)[TILE / 8][4], const char* values) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        const float(&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
        uint32_t a[4] = {to_half2(left[0], left[1]), to_half2(left[2], left[3]), to_half2(right[0], right[1]),
                         to_half2(right[2], right[3])};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t b[4];
            load_matrix_x4_transposed(b, values + tile_offset<ROW_BYTES>(k * 16 + lane % 16, step * 2 + lane / 16));
            mma_half(sums[2 * step], a, b[0], b[1]);
            mma_half(sums[2 * step + 1], a, b[2], b[3]);
        }
    }
}

// A lane has two queries of its warp, g and g + 8: index 0 and 1.
struct Softmax {
    float largest[2];
    float sum[2];  // this lane's share
};

// Scores to weights 2^(score - largest); scales the sums where the largest score has grown.
DEVICE void weigh_tile(Softmax& softmax, float (&scores)[TILE / 8][4], float (&sums)[VALUE_STEPS][4]) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = softmax.largest[half];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        factor[half] = exp2_fast(softmax.largest[half] - largest);
        softmax.largest[half] = largest;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) sum += scores[n][i] = exp2_fast(scores[n][i] - largest);
        softmax.sum[half] = fmaf(softmax.sum[half], factor[half], sum);
    }
    if (!__ballot_sync(ALL_LANES, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
    for (int n = 0; n < VALUE_STEPS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][i] *= factor[i / 2];
}

DEVICE void put_rows(const PrefillArguments& a, Softmax& softmax, const float (&sums)[VALUE_STEPS][4], int first_token,
                     int kv_head) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = softmax.sum[half];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        int row = threadIdx.x / 32 * 16 + lane / 4 + half * 8, token = first_token + row / GROUP;
        if (row >= TOKENS * GROUP || token >= a.rows) continue;
        int head = kv_head * GROUP + row % GROUP, d = lane % 4 * 2;
        const float* gates = a.q_gate + (int64_t)token * a.q_stride + (head * 2 + 1) * HEAD_DIM + d;
        uint16_t* y = a.y + ((int64_t)token * NUM_HEADS + head) * HEAD_DIM + d;
        float factor = 1.f / sum;
#pragma unroll
        for (int n = 0; n < VALUE_STEPS; n++) {
            float2 gate = *(const float2*)(gates + n * 8);
            float left = sums[n][2 * half] * factor * sigmoid(gate.x);
            float right = sums[n][2 * half + 1] * factor * sigmoid(gate.y);
            *(uint32_t*)(y + n * 8) = to_half2(clamp_half(left), clamp_half(right));
        }
    }
}

// Grid (Hkv, ceil(T / TOKENS)), the last rows first: they have the most to read.
KERNEL __launch_bounds__(THREADS, 2) attention_prefill(const __grid_constant__ PrefillArguments a) {
    extern __shared__ uint4 shared_memory[];
    char *queries = (char*)shared_memory, *keys = queries + TILE_BYTES, *values = keys + TILE_BYTES;
    float2* turns = (float2*)keys;  // [TOKENS, HALF], while there are no keys
    int lane = threadIdx.x & 31, kv_head = blockIdx.x, first_token = (gridDim.y - 1 - blockIdx.y) * TOKENS;
    int first = *a.position + a.position_offset + first_token;
    int end = first + min(TOKENS, a.rows - first_token), tiles = (end + TILE - 1) / TILE;
    HeadRow weight;
    load_row(weight, a.q_norm);
    for (int i = threadIdx.x; i < TOKENS * HALF; i += THREADS)
        fill_turns(turns + i / HALF * HALF, a.inverse_frequencies, first + i / HALF, i % HALF, HALF);
    wait_for_previous();
    launch_next();
    __syncthreads();
    put_queries(a, queries, turns, weight, first_token, kv_head);
    __syncthreads();
    const char* key_rows = cache_rows(a.kv_cache, KEYS, kv_head, a.capacity);
    const char* value_rows = cache_rows(a.kv_cache, VALUES, kv_head, a.capacity);
    load_tile(keys, key_rows, 0, end);
    copy_commit();
    Softmax softmax = {{__uint_as_float(0xff800000u), __uint_as_float(0xff800000u)}, {0.f, 0.f}};
    float sums[VALUE_STEPS][4] = {}, scores[TILE / 8][4];
    int row = threadIdx.x / 32 * 16 + lane / 4;
    int position[2] = {first + row / GROUP, first + (row + 8) / GROUP};
    for (int tile = 0; tile < tiles; tile++) {
        int start = tile * TILE;
        copy_wait<0>();
        __syncthreads();  // the keys are here, and nobody needs the values before
        load_tile(values, value_rows, start, end);
        copy_commit();
        score_tile(scores, queries, keys);
        if (start + TILE - 1 > first) {
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (start + n * 8 + lane % 4 * 2 + i % 2 > position[i / 2]) scores[n][i] = __uint_as_float(0xff800000u);
        }
        weigh_tile(softmax, scores, sums);
        copy_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) load_tile(keys, key_rows, start + TILE, end);
        copy_commit();
        mix_tile(sums, scores, values);
    }
    put_rows(a, softmax, sums, first_token, kv_head);
}

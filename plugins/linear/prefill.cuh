// outᵀ = W Xᵀ for many rows on tensor cores: weights of any format times float16 rows, sums in float32.
//
// A block multiplies 128 rows of the weight with up to 128 rows of x ("tokens"), both passing through a ring of stages
// in shared memory, 64 k each. A warp owns 32 rows of the weight and all tokens: a weight is unpacked once, in
// registers. Of a stage, lane (g, t) takes k 16t .. 16t+15 of its rows, weights and tokens alike, four for each of the
// four instructions of k 16: a product runs over k, so only both sides' agreement on the order matters, and this one
// needs neither ldmatrix nor permuted rows and gives a lane one NVFP4 group. A token's sums do not depend on the tile.
#pragma once
#include "linear/segment.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int TILE_ROWS = 128;          // of the weight; SWIGLU: 64 of the gate's and the same 64 of the up's
constexpr int CHUNK = 64;               // k of a stage
constexpr int SHARED_BYTES = 96 << 10;  // dynamic: two blocks a multiprocessor on Hopper, one on consumer Blackwell
constexpr int SCALE_CHUNKS = 4;         // stages that 16 bytes of a row's NVFP4 scales last for
constexpr int SCALE_SLOTS = 4;          // of such bytes: those of up to 7 stages ahead, crossing one start of a row
constexpr int STORE_HALF = 3;           // one epilogue more: float16 y

// What a block multiplies. In shared memory: most of it is needed once, registers are what the product lacks.
struct Tile {
    const uint8_t* weight;  // from the tile's first row on, [.., K] in its format; SWIGLU: the gate's
    const uint8_t* weight_up;
    const uint8_t* scale;
    const uint8_t* scale_up;
    const float* scale_2;
    const float* scale_2_up;
    int last_row;            // of the weight, counted from the tile's first row: what lies behind repeats it
    bool paired;             // of every 16 rows the first 8 are the gate's, the rest the up's
    const uint16_t* x;       // float16 [.., K]
    const uint16_t* x_rest;  // what float16 rounded off x, or null
    const int* source;       // x's row of each token; null: tokens are rows
    int first_token;
    int tokens;
    int k;
    int epilogue;
    void* out;  // from the tile's first token and feature on
    int out_stride;
    int features;  // that the tile has in `out`
};

DEVICE int64_t row_bytes(int format, int k) { return format == BF16 ? 2 * k : format == FP8 ? k : k / 2; }

// ---- unpacking: a lane's sixteen weights of a row, eight at a time, as half2 of neighbours --------------------------

template <int FORMAT>
struct Weights;

// Codes come out as 2^-14 of their value, scales as 2^-8: with 2^15 the product is value * 2^-7, exact in float16
// from the smallest (2^-17) to the largest (21).
template <>
struct Weights<NVFP4> {
    static constexpr int ROW_BYTES = CHUNK / 2;
    static constexpr float FACTOR = 128.f;
    uint2 codes;
    uint32_t scale;

    DEVICE void load(const uint8_t* weights, const uint8_t* scales, int row, int t) {
        codes = *(const uint2*)(weights + row * ROW_BYTES + 8 * t);
        uint32_t both = scales[row * 16 + t] * 0x01000100u;  // the byte on top of each half
        scale = mul_half2((both & 0x80008000u) | ((both >> 1) & 0x3f803f80u), 0x78007800u);
    }
    DEVICE void unpack(int half, uint32_t (&pair)[4]) const {
        uint32_t word = half ? codes.y : codes.x;
        // A code as the top byte of a half: its sign on top, its magnitude in bits 3 .. 1.
        uint32_t sign = word << 4, magnitude = word << 1;
        uint32_t even02 = (sign & 0x00800080u) | (magnitude & 0x000e000eu);  // the low nibbles of bytes 0 and 2
        uint32_t even13 = (sign & 0x80008000u) | (magnitude & 0x0e000e00u);
        uint32_t odd = (word & 0x80808080u) | ((word >> 3) & 0x0e0e0e0eu);
        pair[0] = mul_half2(__byte_perm(even02, odd, 0x4101), scale);  // bytes: 0, even, 0, odd
        pair[1] = mul_half2(__byte_perm(even13, odd, 0x5010), scale);
        pair[2] = mul_half2(__byte_perm(even02, odd, 0x6121), scale);
        pair[3] = mul_half2(__byte_perm(even13, odd, 0x7030), scale);
    }
};

template <>
struct Weights<FP8> {
    static constexpr int ROW_BYTES = CHUNK;
    static constexpr float FACTOR = 256.f;  // the exponents' biases differ by 8
    uint4 bytes;

    DEVICE void load(const uint8_t* weights, const uint8_t*, int row, int t) {
        bytes = *(const uint4*)(weights + row * ROW_BYTES + 16 * t);
    }
    DEVICE static void unpack(uint32_t word, uint32_t& low, uint32_t& high) {
        uint32_t top = (word & 0x80808080u) | ((word >> 1) & 0x3f3f3f3fu);
        uint32_t rest = (word << 7) & 0x80808080u;
        low = __byte_perm(rest, top, 0x5140);
        high = __byte_perm(rest, top, 0x7362);
    }
    DEVICE void unpack(int half, uint32_t (&pair)[4]) const {
        unpack(half ? bytes.z : bytes.x, pair[0], pair[1]);
        unpack(half ? bytes.w : bytes.y, pair[2], pair[3]);
    }
};

template <>
struct Weights<BF16> {
    static constexpr int ROW_BYTES = 2 * CHUNK;
    static constexpr float FACTOR = 1.f;
    const uint8_t* address;  // read when needed: sixteen values take eight registers
    int odd;

    DEVICE void load(const uint8_t* weights, const uint8_t*, int row, int t) {
        address = weights + row * ROW_BYTES + 32 * t;
        odd = row & 1;
    }
    DEVICE static uint32_t unpack(uint32_t pair) {
        return to_half2(clamp_half(bf16_low(pair)), clamp_half(bf16_high(pair)));
    }
    DEVICE void unpack(int half, uint32_t (&pair)[4]) const {
        uint4 v = *(const uint4*)(address + 16 * (half ^ odd));
        pair[0] = unpack(v.x), pair[1] = unpack(v.y), pair[2] = unpack(v.z), pair[3] = unpack(v.w);
    }
};

// ---- the product ----------------------------------------------------------------------------------------------------

// Odd rows of 128 bytes (of x, of BF16 weights) have their 16-byte pieces exchanged in pairs, so that eight lanes,
// which read every second piece of two rows, meet all banks.
template <int FORMAT, int TOKENS>
struct Product {
    typedef Weights<FORMAT> Row;
    static constexpr int X_BYTES = TOKENS * 2 * CHUNK;
    static constexpr int STAGE_BYTES = X_BYTES + TILE_ROWS * Row::ROW_BYTES;
    static constexpr int SCALE_BYTES = FORMAT == NVFP4 ? TILE_ROWS * 16 : 0;
    static constexpr int FITTING = (SHARED_BYTES - SCALE_SLOTS * SCALE_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FITTING < 8 ? FITTING : 8;
    static constexpr int PIECES = Row::ROW_BYTES / 16;  // of a weight's row in a stage; a thread copies as many
    static constexpr int COLUMNS = TOKENS / 8;  // of 8 tokens
    static_assert(STAGES >= 3 && TOKENS % 16 == 0 && TOKENS * (TILE_ROWS + 4) * 4 <= SHARED_BYTES, "shared memory");

    const Tile& tile;
    uint8_t* shared;
    int k, chunks, steps;
    const uint16_t *x, *x_rest;
    const uint8_t *weight, *scale;  // this thread's matrix
    uint32_t weight_offset[PIECES], x_offset[TOKENS / 16];

    DEVICE Product(const Tile& tile, uint8_t* shared) : tile(tile), shared(shared) {
        k = tile.k, x = tile.x, x_rest = tile.x_rest;
        chunks = (k + CHUNK - 1) / CHUNK;
        steps = x_rest ? 2 * chunks : chunks;
        int row = threadIdx.x / PIECES;
        weight = is_up(row) ? tile.weight_up : tile.weight;
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            weight_offset[i] =
                matrix_row(row + i * (THREADS / PIECES)) * (int)row_bytes(FORMAT, k) + threadIdx.x % PIECES * 16;
        if (FORMAT == NVFP4)
            scale = (is_up(threadIdx.x) ? tile.scale_up : tile.scale) + matrix_row(threadIdx.x) * (k / 16);
    }
    DEVICE bool is_up(int row) const { return tile.paired && row % 16 >= 8; }
    DEVICE int matrix_row(int row) const { return min(tile.paired ? row / 16 * 8 + row % 8 : row, tile.last_row); }

    DEVICE uint8_t* stage(int slot) const { return shared + SCALE_SLOTS * SCALE_BYTES + slot * STAGE_BYTES; }
    DEVICE int chunk(int step) const { return step < chunks ? step : step - chunks; }
    DEVICE uint8_t* scales(int step) const {  // of the first row; the others' follow at 16 bytes
        int slot = chunk(step) / SCALE_CHUNKS + (step < chunks ? 0 : (chunks + SCALE_CHUNKS - 1) / SCALE_CHUNKS);
        return shared + slot % SCALE_SLOTS * SCALE_BYTES + chunk(step) % SCALE_CHUNKS * (CHUNK / 16);
    }

    DEVICE void copy_weights(int step, uint8_t* stage) const {
        constexpr int PIECE_K = CHUNK / PIECES;
        int start = chunk(step) * CHUNK, piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
        int swapped = FORMAT == BF16 ? piece ^ (row & 1) : piece;
        uint8_t* to = stage + X_BYTES + row * Row::ROW_BYTES + swapped * 16;
        const uint8_t* from = weight + start / CHUNK * Row::ROW_BYTES;
        bool valid = start + piece * PIECE_K < k;
#pragma unroll
        for (int i = 0; i < PIECES; i++) copy_async16(to + i * (THREADS * 16), from + weight_offset[i], valid);
        if (FORMAT == NVFP4 && chunk(step) % SCALE_CHUNKS == 0) copy_scales(start, scales(step) + threadIdx.x * 16);
    }

    // A row's next 16 scales. Rows of scales are aligned to 16 bytes only where K is a multiple of 256.
    DEVICE void copy_scales(int start, uint8_t* to) const {
        const uint8_t* from = scale + start / 16;
        if (k % 256 == 0) return copy_async16(to, from, true);
#pragma unroll
        for (int i = 0; i < 8; i++)
            ((uint16_t*)to)[i] = start + 32 * i < k ? ((const uint16_t*)from)[i] : (uint16_t)0;
    }

    DEVICE void locate_rows() {
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) {
            int token = tile.first_token + min((int)threadIdx.x / 8 + 16 * i, tile.tokens - 1);
            uint32_t row = tile.source ? tile.source[token] : token;
            x_offset[i] = row * (uint32_t)(k / 8) + threadIdx.x % 8;
        }
    }

    DEVICE void copy_rows(int step, uint8_t* stage) const {
        int start = chunk(step) * CHUNK, piece = threadIdx.x % 8, token = threadIdx.x / 8;
        const uint16_t* from = (step < chunks ? x : x_rest) + start;
        uint8_t* to = stage + token * (2 * CHUNK) + (piece ^ (token & 1)) * 16;
        bool valid = start + piece * 8 < k;
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++)
            copy_async16(to + i * (16 * 2 * CHUNK), from + (uint64_t)x_offset[i] * 8, valid);
    }

    DEVICE void multiply(const uint8_t* stage, const uint8_t* scales, float (&sum)[2][COLUMNS][4]) const {
        constexpr int TOGETHER = COLUMNS % 4 ? 2 : 4;  // columns: enough instructions between two on the same sums
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first_row = threadIdx.x / 32 * 32 + g;
        Row rows[4];
#pragma unroll
        for (int i = 0; i < 4; i++) rows[i].load(stage + X_BYTES, scales, first_row + 8 * i, t);
        const uint8_t* x = stage + g * (2 * CHUNK) + t * 32;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[2][2][4];  // [16 rows each, k 16, register]
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t pair[4];
                rows[i].unpack(half, pair);
#pragma unroll
                for (int j = 0; j < 4; j++) a[i / 2][j / 2][i % 2 + j % 2 * 2] = pair[j];
            }
            const uint8_t* piece = x + 16 * (half ^ (g & 1));
#pragma unroll
            for (int first = 0; first < COLUMNS; first += TOGETHER) {
                uint4 b[TOGETHER];
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) b[j] = *(const uint4*)(piece + (first + j) * (8 * 2 * CHUNK));
#pragma unroll
                for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                    for (int m = 0; m < 2; m++) mma_half(sum[m][first + j], a[m][0], b[j].x, b[j].y);
#pragma unroll
                for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                    for (int m = 0; m < 2; m++) mma_half(sum[m][first + j], a[m][1], b[j].z, b[j].w);
            }
        }
    }

    DEVICE void run(float (&sum)[2][COLUMNS][4]) {
        for (int step = 0; step < STAGES - 1 && step < steps; step++) copy_weights(step, stage(step));
        wait_for_previous();
        launch_next();
        locate_rows();
        for (int step = 0; step < STAGES - 1; step++) {
            if (step < steps) copy_rows(step, stage(step));
            copy_commit();
        }
        int slot = 0, free_slot = STAGES - 1;
        for (int step = 0; step < steps; step++) {
            copy_wait<STAGES - 2>();
            __syncthreads();
            if (step + STAGES - 1 < steps) {
                copy_weights(step + STAGES - 1, stage(free_slot));
                copy_rows(step + STAGES - 1, stage(free_slot));
            }
            copy_commit();
            multiply(stage(slot), scales(step), sum);
            free_slot = slot;
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
    }
};

// ---- the end: through shared memory, so that a warp writes neighbouring features of one token -----------------------

DEVICE void store_half2(uint16_t* out, int count, float low, float high) {
    uint32_t pair = to_half2(clamp_half(low), clamp_half(high));
    if (count >= 2 && (uint64_t)out % 4 == 0) {
        *(uint32_t*)out = pair;
    } else {
        if (count >= 1) out[0] = (uint16_t)pair;
        if (count >= 2) out[1] = (uint16_t)(pair >> 16);
    }
}

template <int COLUMNS>
DEVICE void gather(const Tile& tile, const float (&sum)[2][COLUMNS][4], float factor, float factor_up, float* values,
                   int stride) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float* token = values + (8 * j + 2 * t + i) * stride;
                float first = sum[m][j][i] * factor, second = sum[m][j][2 + i] * factor_up;
                if (tile.paired) {
                    token[16 * warp + 8 * m + g] = silu(first) * second;
                } else {
                    token[32 * warp + 16 * m + g] = first;
                    token[32 * warp + 16 * m + g + 8] = second;
                }
            }
}

template <int TOKENS>
DEVICE void write_out(const Tile& tile, const float* values, int stride) {
    constexpr int BATCH = TOKENS / WARPS < 8 ? TOKENS / WARPS : 8;  // tokens whose old values are read at once
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (tile.epilogue == SWIGLU || tile.epilogue == STORE_HALF) {
        for (int token = warp; token < tile.tokens; token += WARPS)
            for (int feature = 2 * lane; feature < tile.features; feature += 64) {
                float2 pair = *(const float2*)(values + token * stride + feature);
                uint16_t* out = (uint16_t*)tile.out + (int64_t)token * tile.out_stride + feature;
                store_half2(out, tile.features - feature, pair.x, pair.y);
            }
        return;
    }
    for (int first = warp; first < tile.tokens; first += WARPS * BATCH) {
        float old[BATCH][TILE_ROWS / 32];
#pragma unroll
        for (int i = 0; i < BATCH; i++)
#pragma unroll
            for (int j = 0; j < TILE_ROWS / 32; j++) {
                int token = first + WARPS * i, feature = lane + 32 * j;
                bool valid = tile.epilogue == ADD && token < tile.tokens && feature < tile.features;
                old[i][j] = valid ? ((const float*)tile.out)[(int64_t)token * tile.out_stride + feature] : 0.f;
            }
#pragma unroll
        for (int i = 0; i < BATCH; i++)
#pragma unroll
            for (int j = 0; j < TILE_ROWS / 32; j++) {
                int token = first + WARPS * i, feature = lane + 32 * j;
                if (token < tile.tokens && feature < tile.features)
                    ((float*)tile.out)[(int64_t)token * tile.out_stride + feature] =
                        old[i][j] + values[token * stride + feature];
            }
    }
}

// The smallest of TOKENS, MORE... that holds the tile's tokens. All threads of the block call it.
template <int FORMAT, int TOKENS, int... MORE>
DEVICE void multiply_tile(const Tile& tile, uint8_t* shared) {
    if constexpr (sizeof...(MORE) > 0)
        if (tile.tokens > TOKENS) return multiply_tile<FORMAT, MORE...>(tile, shared);
    float factor = Weights<FORMAT>::FACTOR, factor_up = factor;
    if (FORMAT != BF16) factor *= *tile.scale_2, factor_up *= *(tile.paired ? tile.scale_2_up : tile.scale_2);
    float sum[2][TOKENS / 8][4] = {};
    Product<FORMAT, TOKENS>(tile, shared).run(sum);
    copy_wait<0>();
    __syncthreads();
    int stride = (tile.paired ? TILE_ROWS / 2 : TILE_ROWS) + 4;  // lanes (g, t) meet all banks
    gather<TOKENS / 8>(tile, sum, factor, factor_up, (float*)shared, stride);
    __syncthreads();
    write_out<TOKENS>(tile, (const float*)shared, stride);
}

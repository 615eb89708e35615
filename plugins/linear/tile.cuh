// Products of few rows: a warp multiplies 16 weight rows with up to 8 activation rows on the tensor cores.
//
// Decoding reads weights and little else, so everything here serves loads of 16 bytes straight from the checkpoint's
// own layout. Lane 4g + t holds 16 bytes of rows g and g + 8; the quad of a row covers 64 bytes: a step. The dot
// product may visit k in any order that weights and activations share, so that codes need no shuffling.
// Activations keep 22 bits of mantissa as two float16, high + low (with bfloat16 weights 16 bits as two bfloat16): two
// of the tensor core's eight columns each, so that four rows take one product, eight rows two. Weights are exact.
// Unused columns cost nothing: one code for every number of rows, and with it the same bits.
#pragma once
#include "segment.cuh"

constexpr int TILE = 16;      // weight rows
constexpr int MAX_ROWS = 8;   // activation rows
constexpr int SET_ROWS = 4;   // activation rows of one product
constexpr int STEP = 64;      // bytes of a weight row that a quad of lanes holds at a time
constexpr int STEPS = 2;      // a warp's pass: 128 bytes of each of 16 rows
constexpr int PASS = STEPS * STEP;

// ---- activations -------------------------------------------------------------------------------------------------
// A row is two vectors of 16-bit values, the high and the low parts, in chunks of eight. NVFP4 pairs values four apart
// (nibbles i and i + 4 of a word): its chunks hold 0 4 1 5 2 6 3 7.

// The odd 16 bytes put high and low parts, which are read together, on distinct banks.
DEVICE int vector_bytes(int k) { return 2 * k + 16; }
DEVICE int chunk_place(int chunk) { return 16 * (chunk ^ ((chunk >> 2) & 2)); }  // bytes; a quad's on distinct banks

// Scales that keep a row's values far from float16's ends, by the bits of the largest magnitude: powers of two.
DEVICE uint32_t scale_bits(uint32_t largest) { return (uint32_t)min(max(268 - (int)(largest >> 23), 1), 253); }
DEVICE float scale_of(uint32_t largest, int format) {
    return format == BF16 ? 1.f : __uint_as_float(scale_bits(largest) << 23);  // the largest comes to 2^14 .. 2^15
}
DEVICE float unscale_of(uint32_t largest, int format) {
    return format == BF16 ? 1.f : __uint_as_float((254 - scale_bits(largest)) << 23);
}

DEVICE void split_pair(uint32_t& high, uint32_t& low, float a, float b, int format) {
    if (format == BF16) {
        high = to_bf16x2(a, b);
        low = to_bf16x2(a - bf16_low(high), b - bf16_high(high));
    } else {
        high = to_half2(a, b);
        low = to_half2(a - half_low(high), b - half_high(high));
    }
}

// Chunks of eight values as floats, until the row's scale is known: in the place of the high and the low parts.
DEVICE void put_raw(uint8_t* place, int stride, const float (&x)[8]) {
    *(float4*)place = make_float4(x[0], x[1], x[2], x[3]);
    *(float4*)(place + stride) = make_float4(x[4], x[5], x[6], x[7]);
}

DEVICE void split_raw(uint8_t* place, int stride, float scale, int format) {
    float4 a = *(float4*)place, b = *(float4*)(place + stride);
    float x[8] = {a.x * scale, a.y * scale, a.z * scale, a.w * scale, b.x * scale, b.y * scale, b.z * scale, b.w * scale};
    bool apart = format == NVFP4;
    uint4 high, low;
    split_pair(high.x, low.x, x[0], apart ? x[4] : x[1], format);
    split_pair(high.y, low.y, apart ? x[1] : x[2], apart ? x[5] : x[3], format);
    split_pair(high.z, low.z, apart ? x[2] : x[4], apart ? x[6] : x[5], format);
    split_pair(high.w, low.w, apart ? x[3] : x[6], x[7], format);
    *(uint4*)place = high;
    *(uint4*)(place + stride) = low;
}

DEVICE uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

DEVICE void load_eight(float (&x)[8], const float* address) {
    float4 a = __ldcg((const float4*)address), b = __ldcg((const float4*)address + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// ---- weights -----------------------------------------------------------------------------------------------------

DEVICE int bytes_of(int k, int format) { return format == NVFP4 ? k >> 1 : format == FP8 ? k : 2 * k; }

// 16 weight rows: two runs of eight, 0..7 and 8..15 of a matrix, or eight of a gate and eight of an up projection.
// Pointers are the lane's: to its 16 bytes of the first step of its two rows, and to its four scales.
struct Tile {
    const uint8_t *low, *high, *scale_low, *scale_high;
};

// Rows past n are read as row n - 1; their products are nobody's.
DEVICE Tile make_tile(const uint8_t* weight, const uint8_t* scale, const uint8_t* weight_up, const uint8_t* scale_up,
                      int first, int n, int k, int format) {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3, bytes = bytes_of(k, format), scales = k >> 4;
    int64_t low = min(first + g, n - 1), high = weight_up ? low : min(first + g + 8, n - 1);
    if (!weight_up) weight_up = weight, scale_up = scale;
    return {weight + low * bytes + t * 16, weight_up + high * bytes + t * 16, scale + low * scales + t * 4,
            scale_up + high * scales + t * 4};
}

// A pass of a warp on its way from global memory, at no cost in registers.
struct Slot {
    uint4 codes[STEPS][2][32];  // [step][run][lane]: each lane reads what it copied itself
    uint32_t scales[TILE][4];   // [row][..]: 16 E4M3 scales
};

// Starts copying the bytes at..at + PASS of the tile's rows; those from `end` on come as zeros.
DEVICE void fetch(Slot& slot, const Tile& tile, int at, int end, int format) {
    int lane = threadIdx.x & 31, t = lane & 3, left = end - at - t * 16;
    uint64_t policy = evict_first();
    const uint8_t *low = tile.low + at, *high = tile.high + at;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        copy_weights16(&slot.codes[s][0][lane], low + s * STEP, left > s * STEP, policy);
        copy_weights16(&slot.codes[s][1][lane], high + s * STEP, left > s * STEP, policy);
    }
    if (format == NVFP4) {
        int offset = at >> 3;
        bool valid = offset + t * 4 < end >> 3;
        copy_async4(&slot.scales[lane >> 2][t], tile.scale_low + offset, valid);
        copy_async4(&slot.scales[(lane >> 2) + 8][t], tile.scale_high + offset, valid);
    }
}

// Waits for the oldest of `depth` passes.
constexpr int MAX_DEPTH = 8;
DEVICE void wait_for_pass(int depth) {
    if (depth == 8) copy_wait<7>();
    else if (depth == 6) copy_wait<5>();
    else if (depth == 4) copy_wait<3>();
    else if (depth == 7) copy_wait<6>();
    else if (depth == 5) copy_wait<4>();
    else if (depth == 3) copy_wait<2>();
    else if (depth == 2) copy_wait<1>();
    else copy_wait<0>();
    __syncwarp();
}

DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// NVFP4: codes become float16 of value * 2^-14, times the E4M3 scale: exact.
constexpr float NVFP4_FACTOR = 16384.f;

// The pairs of nibbles (0, 4), (1, 5), (2, 6), (3, 7) of a word: sign to bit 15, magnitude to bits 9 to 11.
DEVICE void nvfp4_pairs(uint32_t (&pair)[4], uint32_t codes, uint32_t scale) {
    uint32_t even = (codes * 16 & 0x80808080u) | (codes * 2 & 0x0e0e0e0eu);  // the high bytes of nibbles 0 2 4 6
    uint32_t odd = (codes & 0x80808080u) | (codes >> 3 & 0x0e0e0e0eu);       // of nibbles 1 3 5 7
    pair[0] = mul_half2(__byte_perm(even, 0, 0x2404), scale);
    pair[1] = mul_half2(__byte_perm(odd, 0, 0x2404), scale);
    pair[2] = mul_half2(even & 0xff00ff00u, scale);
    pair[3] = mul_half2(odd & 0xff00ff00u, scale);
}

// Four chains of sums for each four rows, so that products need not wait for each other.
template <int SETS>
struct Sums {
    float c[SETS][4][4];
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < SETS * 16; i++) c[i / 16][i / 4 % 4][i % 4] = 0.f;
    }
    // Of weight row g (half 0) or g + 8 and row t of a set: high and low parts are neighbouring columns.
    DEVICE float total(int set, int half) const {
        const float(&v)[4][4] = c[set];
        float high = (v[0][2 * half] + v[1][2 * half]) + (v[2][2 * half] + v[3][2 * half]);
        float low = (v[0][2 * half + 1] + v[1][2 * half + 1]) + (v[2][2 * half + 1] + v[3][2 * half + 1]);
        return high + low;
    }
};

// sums += a pass of weights times the rows. vectors: the lane's column of the product in each set, in `memory`.
// begin, end: the share of the rows in bytes; columns past the last row have no reader.
template <int SETS, int FORMAT>
DEVICE void multiply_pass(Sums<SETS>& sums, const Slot& slot, int at, int begin, int end, const uint8_t* memory,
                          const int (&vectors)[SETS]) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        uint4 low = slot.codes[s][0][lane], high = slot.codes[s][1][lane];
        int offset = at + s * STEP + t * 16;
        if (offset >= end) offset = begin;  // zeros times anything finite
        if (FORMAT == NVFP4) {
            int chunk = offset >> 2, swap = (chunk >> 2) & 2;
            int first = 16 * (chunk + swap), second = 16 * (chunk + 2 - swap);
            uint32_t l = e4m3x2_to_half2(((const uint16_t*)slot.scales[g])[s * 4 + t]);
            uint32_t h = e4m3x2_to_half2(((const uint16_t*)slot.scales[g + 8])[s * 4 + t]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t of_low[4], of_high[4];
                nvfp4_pairs(of_low, word(low, j), __byte_perm(l, 0, j < 2 ? 0x1010 : 0x3232));
                nvfp4_pairs(of_high, word(high, j), __byte_perm(h, 0, j < 2 ? 0x1010 : 0x3232));
                uint32_t a[4] = {of_low[0], of_high[0], of_low[1], of_high[1]};
                uint32_t b[4] = {of_low[2], of_high[2], of_low[3], of_high[3]};
#pragma unroll
                for (int set = 0; set < SETS; set++) {
                    uint4 x = *(const uint4*)(memory + vectors[set] + (j < 2 ? first : second) + j % 2 * 16);
                    mma_half(sums.c[set][j % 2 * 2], a, x.x, x.y);
                    mma_half(sums.c[set][j % 2 * 2 + 1], b, x.z, x.w);
                }
            }
        } else if (FORMAT == FP8) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t a[2][4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    uint32_t l = word(low, 2 * j + i), h = word(high, 2 * j + i);
                    a[i][0] = e4m3x2_to_half2((uint16_t)l), a[i][1] = e4m3x2_to_half2((uint16_t)h);
                    a[i][2] = e4m3x2_to_half2((uint16_t)(l >> 16)), a[i][3] = e4m3x2_to_half2((uint16_t)(h >> 16));
                }
#pragma unroll
                for (int set = 0; set < SETS; set++) {
                    uint4 x = *(const uint4*)(memory + vectors[set] + chunk_place(offset >> 3) + j * 16);
                    mma_half(sums.c[set][2 * j], a[0], x.x, x.y);
                    mma_half(sums.c[set][2 * j + 1], a[1], x.z, x.w);
                }
            }
        } else {
            uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                uint4 x = *(const uint4*)(memory + vectors[set] + chunk_place(offset >> 4));
                mma_bf16(sums.c[set][2 * s], a, x.x, x.y);
                mma_bf16(sums.c[set][2 * s + 1], b, x.z, x.w);
            }
        }
    }
}

template <int SETS>
DEVICE void multiply(Sums<SETS>& sums, const Slot& slot, int format, int at, int begin, int end, const uint8_t* memory,
                     const int (&vectors)[SETS]) {
    if (format == NVFP4) multiply_pass<SETS, NVFP4>(sums, slot, at, begin, end, memory, vectors);
    else if (format == FP8) multiply_pass<SETS, FP8>(sums, slot, at, begin, end, memory, vectors);
    else multiply_pass<SETS, BF16>(sums, slot, at, begin, end, memory, vectors);
}

// What a product's sums are to be multiplied with, of a format whose second scale is `scale_2`.
DEVICE float factor_of(float scale_2, int format) {
    return format == NVFP4 ? NVFP4_FACTOR * scale_2 : format == FP8 ? scale_2 : 1.f;
}

// Products of few rows: a warp multiplies 16 weight rows with up to 8 activation rows on the tensor cores.
//
// Decoding reads weights and little else, so everything here serves loads of 16 bytes straight from the checkpoint's
// own layout. Lane 4g + t holds 16 bytes of rows g and g + 8; the quad of a row covers 64 bytes: a step. The dot
// product may visit k in any order that weights and activations share, so that codes need no shuffling.
// Activations keep 16 bits of mantissa: x = high + low in bfloat16, two products, at no cost in time where memory is
// the limit. Weights are exact in bfloat16 in all three formats. Unused columns of the tensor core's eight cost nothing
// either: one code for every number of rows, and with it the same bits.
#pragma once
#include "segment.cuh"

constexpr int TILE = 16;      // weight rows
constexpr int MAX_ROWS = 8;   // activation rows
constexpr int STEP = 64;      // bytes of a weight row that a quad of lanes holds at a time

// ---- activations -------------------------------------------------------------------------------------------------
// Four values k..k+3 of a row make an entry {high pair, high pair, low pair, low pair}. NVFP4 pairs values four apart
// (nibbles i and i + 4 of a word), so there two entries share eight values: (0,4)(1,5) and (2,6)(3,7).

DEVICE int entry_place(int entry) { return entry ^ ((entry >> 2) & 6); }  // keeps a quad's reads on distinct banks

DEVICE int entry_stride(int k) { return k / 4 + 1; }  // odd, so that two rows' reads fall on distinct banks

DEVICE uint4 make_entry(float a, float b, float c, float d) {
    uint32_t high0 = to_bf16x2(a, b), high1 = to_bf16x2(c, d);
    uint32_t low0 = to_bf16x2(a - bf16_low(high0), b - bf16_high(high0));
    uint32_t low1 = to_bf16x2(c - bf16_low(high1), d - bf16_high(high1));
    return make_uint4(high0, high1, low0, low1);
}

DEVICE void make_entries(uint4& first, uint4& second, const float (&x)[8], bool nvfp4) {
    first = nvfp4 ? make_entry(x[0], x[4], x[1], x[5]) : make_entry(x[0], x[1], x[2], x[3]);
    second = nvfp4 ? make_entry(x[2], x[6], x[3], x[7]) : make_entry(x[4], x[5], x[6], x[7]);
}

// Writes one value of a row of entries, as make_entries would.
DEVICE void put_value(uint4* entries, int k, float value, bool nvfp4) {
    int i = k & 7;
    int entry = nvfp4 ? (i >> 1) & 1 : i >> 2;
    int place = nvfp4 ? (i & 1) * 2 + (i >> 2) : i & 3;  // half-word of the entry's high parts
    uint32_t high = to_bf16x2(value, 0.f) & 0xffffu;
    uint32_t low = to_bf16x2(value - bf16_low(high), 0.f) & 0xffffu;
    uint16_t* words = (uint16_t*)(entries + (k >> 3) * 2 + entry);
    words[place] = (uint16_t)high;
    words[place + 4] = (uint16_t)low;
}

DEVICE void load_eight(float (&x)[8], const float* address) {
    float4 a = __ldcg((const float4*)address), b = __ldcg((const float4*)address + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// ---- weights -----------------------------------------------------------------------------------------------------

template <int STEPS>
struct Weights {
    uint4 low[STEPS], high[STEPS];  // rows g and g + 8
    uint32_t scale[STEPS];          // NVFP4: two E4M3 scales of each row
};

struct RowPair {
    const uint8_t *low, *high, *scale_low, *scale_high;
};

DEVICE int bytes_of(int k, int format) { return format == NVFP4 ? k / 2 : format == FP8 ? k : 2 * k; }

// offset: the lane's first byte in its rows; a step further is STEP bytes further. Bytes past the row count as zero.
template <int STEPS>
DEVICE void load(Weights<STEPS>& w, const RowPair& rows, int format, int offset, int row_bytes) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int at = offset + s * STEP;
        bool valid = at < row_bytes;
        w.low[s] = valid ? load_weights(rows.low + at) : make_uint4(0, 0, 0, 0);
        w.high[s] = valid ? load_weights(rows.high + at) : make_uint4(0, 0, 0, 0);
        if (format == NVFP4) {
            uint32_t low = valid ? *(const uint16_t*)(rows.scale_low + at / 8) : 0;
            uint32_t high = valid ? *(const uint16_t*)(rows.scale_high + at / 8) : 0;
            w.scale[s] = low | high << 16;
        }
    }
}

DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// NVFP4: nibbles i and i + 4 of a word, times a bfloat16 pair. Codes are bfloat16 of value * 2^-126, scales come as
// scale * 2^112, so the product is value * scale * 2^-14, exact.
constexpr float NVFP4_FACTOR = 16384.f;

DEVICE uint32_t nvfp4_scale(uint32_t byte) {
    float scale = __uint_as_float(byte << 20) * 1.329227995784916e36f * 5.192296858534828e33f;  // 2^120, 2^112
    return __byte_perm(__float_as_uint(scale), 0, 0x3232);
}

template <int I>
DEVICE uint32_t nvfp4_pair(uint32_t codes, uint32_t scale) {
    uint32_t magnitude = I < 2 ? codes << (6 - 4 * I) : codes >> (4 * I - 6);
    uint32_t bits = (magnitude & 0x01c001c0u) | ((codes << (12 - 4 * I)) & 0x80008000u);
    return mul_bf16x2(bits, scale);
}

// FP8: the first or last two bytes of a word; E4M3 bits shifted into a bfloat16 are value * 2^-120.
template <int I>
DEVICE uint32_t fp8_pair(uint32_t codes) {
    uint32_t spread = __byte_perm(codes, 0, 0x3120);  // bytes 0, 2, 1, 3: a pair stands 16 bits apart
    uint32_t magnitude = I ? spread >> 4 : spread << 4, sign = I ? spread : spread << 8;
    return mul_bf16x2((magnitude & 0x07f007f0u) | (sign & 0x80008000u), 0x7b807b80u);
}

// Four independent chains of sums: high and low parts of even and odd entries.
struct Sums {
    float c[4][4];
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 16; i++) c[i / 4][i % 4] = 0.f;
    }
    DEVICE float total(int i) const { return (c[0][i] + c[2][i]) + (c[1][i] + c[3][i]); }
};

template <int PARITY>
DEVICE void accumulate(Sums& sums, const uint32_t (&a)[4], const uint4& b) {
    mma_bf16(sums.c[2 * PARITY], a, b.x, b.y);
    mma_bf16(sums.c[2 * PARITY + 1], a, b.z, b.w);
}

template <int WORD>
DEVICE void multiply_nvfp4(Sums& sums, const uint4& low, const uint4& high, uint32_t scale_low, uint32_t scale_high,
                           const uint4& b0, const uint4& b1) {
    uint32_t l = word(low, WORD), h = word(high, WORD);
    uint32_t first[4] = {nvfp4_pair<0>(l, scale_low), nvfp4_pair<0>(h, scale_high), nvfp4_pair<1>(l, scale_low),
                         nvfp4_pair<1>(h, scale_high)};
    uint32_t second[4] = {nvfp4_pair<2>(l, scale_low), nvfp4_pair<2>(h, scale_high), nvfp4_pair<3>(l, scale_low),
                          nvfp4_pair<3>(h, scale_high)};
    accumulate<0>(sums, first, b0);
    accumulate<1>(sums, second, b1);
}

// sums += weights times entries. entry(i): the lane's row's entry i, zeros where there is none.
template <int STEPS, typename Entry>
DEVICE void multiply(Sums& sums, const Weights<STEPS>& w, int format, int offset, int row_bytes, const Entry& entry) {
    if (format == NVFP4) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int first = (offset + s * STEP) / 2;
            bool valid = offset + s * STEP < row_bytes;
            uint32_t low0 = nvfp4_scale(w.scale[s] & 0xff), low1 = nvfp4_scale(w.scale[s] >> 8 & 0xff);
            uint32_t high0 = nvfp4_scale(w.scale[s] >> 16 & 0xff), high1 = nvfp4_scale(w.scale[s] >> 24);
            multiply_nvfp4<0>(sums, w.low[s], w.high[s], low0, high0, entry(first, valid), entry(first + 1, valid));
            multiply_nvfp4<1>(sums, w.low[s], w.high[s], low0, high0, entry(first + 2, valid), entry(first + 3, valid));
            multiply_nvfp4<2>(sums, w.low[s], w.high[s], low1, high1, entry(first + 4, valid), entry(first + 5, valid));
            multiply_nvfp4<3>(sums, w.low[s], w.high[s], low1, high1, entry(first + 6, valid), entry(first + 7, valid));
        }
    } else if (format == FP8) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int first = (offset + s * STEP) / 4;
            bool valid = offset + s * STEP < row_bytes;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t l = word(w.low[s], j), h = word(w.high[s], j);
                uint32_t a[4] = {fp8_pair<0>(l), fp8_pair<0>(h), fp8_pair<1>(l), fp8_pair<1>(h)};
                if (j & 1) accumulate<1>(sums, a, entry(first + j, valid));
                else accumulate<0>(sums, a, entry(first + j, valid));
            }
        }
    } else {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int first = (offset + s * STEP) / 8;
            bool valid = offset + s * STEP < row_bytes;
            uint32_t even[4] = {w.low[s].x, w.high[s].x, w.low[s].y, w.high[s].y};
            uint32_t odd[4] = {w.low[s].z, w.high[s].z, w.low[s].w, w.high[s].w};
            accumulate<0>(sums, even, entry(first, valid));
            accumulate<1>(sums, odd, entry(first + 1, valid));
        }
    }
}

DEVICE float factor_of(int format, const float* scale_2) {
    return format == NVFP4 ? NVFP4_FACTOR * *scale_2 : format == FP8 ? *scale_2 : 1.f;
}

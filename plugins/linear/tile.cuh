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

// Where a row's entry lies: a quad's reads, and those of two neighbouring rows, fall on distinct banks.
DEVICE int entry_place(int entry, int row) { return entry ^ ((entry >> 2) & 6) ^ (row & 1); }

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

DEVICE int bytes_of(int k, int format) { return format == NVFP4 ? k / 2 : format == FP8 ? k : 2 * k; }

// 16 weight rows: two runs of eight, 0..7 and 8..15 of a matrix, or eight of a gate and eight of an up projection.
// Pointers are the lane's: to its 16 bytes of the first step of its two rows, and to its four scales.
struct Tile {
    const uint8_t *low, *high, *scale_low, *scale_high;
    int row_bytes;
    int format;
    int first;  // row of the matrix
    int id;     // of the segment or the item
};

// Rows past n are read as row n - 1; their products are nobody's.
DEVICE Tile make_tile(const uint8_t* weight, const uint8_t* scale, const uint8_t* weight_up, const uint8_t* scale_up,
                      int first, int n, int k, int format, int id) {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3, bytes = bytes_of(k, format), scales = k / 16;
    int64_t low = min(first + g, n - 1), high = weight_up ? low : min(first + g + 8, n - 1);
    if (!weight_up) weight_up = weight, scale_up = scale;
    return {weight + low * bytes + t * 16, weight_up + high * bytes + t * 16, scale + low * scales + t * 4,
            scale_up + high * scales + t * 4, bytes, format, first, id};
}

constexpr int STEPS = 2;              // a warp's pass: 128 bytes of each of 16 rows
constexpr int PASS = STEPS * STEP;

// What a warp has under way: copies from global memory that need no registers.
template <int DEPTH>
struct Pipeline {
    uint4 codes[DEPTH][STEPS][2][32];   // [slot][step][run][lane]: each lane reads what it copied itself
    uint32_t scales[DEPTH][TILE][4];    // [slot][row][..]: 16 E4M3 scales
};

// Starts copying the bytes at..at + PASS of the tile's rows; bytes past a row's end come as zeros.
template <int DEPTH>
DEVICE void fetch(Pipeline<DEPTH>& pipeline, int slot, const Tile& tile, int at) {
    int lane = threadIdx.x & 31, t = lane & 3;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int offset = at + s * STEP;
        bool valid = offset + t * 16 < tile.row_bytes;
        copy_async16(&pipeline.codes[slot][s][0][lane], tile.low + (valid ? offset : 0), valid);
        copy_async16(&pipeline.codes[slot][s][1][lane], tile.high + (valid ? offset : 0), valid);
    }
    if (tile.format == NVFP4) {
        bool valid = at / 8 + t * 4 < tile.row_bytes / 8;
        copy_async4(&pipeline.scales[slot][lane >> 2][t], tile.scale_low + (valid ? at / 8 : 0), valid);
        copy_async4(&pipeline.scales[slot][(lane >> 2) + 8][t], tile.scale_high + (valid ? at / 8 : 0), valid);
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

// The product puts a nibble's magnitude and its sign into place at once, on the multipliers' pipe: the shifts and masks
// are what limits this kernel, not memory.
template <int I>
DEVICE uint32_t nvfp4_pair(uint32_t codes, uint32_t scale) {
    constexpr uint32_t MASK = I & 1 ? 0x00f000f0u : 0x000f000fu, FACTOR = I & 1 ? (1 << 2) + (1 << 8) : (1 << 6) + (1 << 12);
    uint32_t bits = ((I < 2 ? codes : codes >> 8) & MASK) * FACTOR & 0x81c081c0u;
    return mul_bf16x2(bits, scale);
}

// FP8: the first or last two bytes of a word; E4M3 bits shifted into a bfloat16 are value * 2^-120.
template <int I>
DEVICE uint32_t fp8_pair(uint32_t codes) {
    uint32_t spread = __byte_perm(codes, 0, 0x3120);  // bytes 0, 2, 1, 3: a pair stands 16 bits apart
    uint32_t magnitude = I ? spread >> 4 : spread << 4, sign = I ? spread : spread << 8;
    return mul_bf16x2((magnitude & 0x07f007f0u) | (sign & 0x80008000u), 0x7b807b80u);
}

// Four independent chains of sums: high and low parts of the rows, even and odd entries.
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

// sums += a pass of weights times the entries of a row. row: where the entries of the lane's column of the
// product begin in `memory`, in bytes, a multiple of 128; columns past the last row have no reader.
template <int DEPTH>
DEVICE void multiply(Sums& sums, const Pipeline<DEPTH>& pipeline, int slot, int format, int at, int row_bytes,
                     const uint4* memory, int row, int parity) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        uint4 low = pipeline.codes[slot][s][0][lane], high = pipeline.codes[slot][s][1][lane];
        int offset = at + s * STEP + t * 16;
        if (offset >= row_bytes) offset = 0;  // zeros times anything finite
        int place = row;  // of the lane's first entry; its next ones differ in the low bits only
        auto entry = [&](int i) { return *(const uint4*)((const uint8_t*)memory + (place ^ (i * 16))); };
        if (format == NVFP4) {
            place += 16 * entry_place(offset / 2, parity);
            uint32_t l = ((const uint16_t*)pipeline.scales[slot][g])[s * 4 + t];
            uint32_t h = ((const uint16_t*)pipeline.scales[slot][g + 8])[s * 4 + t];
            uint32_t low0 = nvfp4_scale(l & 0xff), low1 = nvfp4_scale(l >> 8);
            uint32_t high0 = nvfp4_scale(h & 0xff), high1 = nvfp4_scale(h >> 8);
            multiply_nvfp4<0>(sums, low, high, low0, high0, entry(0), entry(1));
            multiply_nvfp4<1>(sums, low, high, low0, high0, entry(2), entry(3));
            multiply_nvfp4<2>(sums, low, high, low1, high1, entry(4), entry(5));
            multiply_nvfp4<3>(sums, low, high, low1, high1, entry(6), entry(7));
        } else if (format == FP8) {
            place += 16 * entry_place(offset / 4, parity);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t l = word(low, j), h = word(high, j);
                uint32_t a[4] = {fp8_pair<0>(l), fp8_pair<0>(h), fp8_pair<1>(l), fp8_pair<1>(h)};
                if (j & 1) accumulate<1>(sums, a, entry(j));
                else accumulate<0>(sums, a, entry(j));
            }
        } else {
            place += 16 * entry_place(offset / 8, parity);
            uint32_t even[4] = {low.x, high.x, low.y, high.y}, odd[4] = {low.z, high.z, low.w, high.w};
            accumulate<0>(sums, even, entry(0));
            accumulate<1>(sums, odd, entry(1));
        }
    }
}

DEVICE float factor_of(int format, const float* scale_2) {
    return format == NVFP4 ? NVFP4_FACTOR * *scale_2 : format == FP8 ? *scale_2 : 1.f;
}

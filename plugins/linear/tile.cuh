// Products of few rows: a warp multiplies 16 weight rows with up to 8 activation rows on the tensor cores.
//
// Decoding reads weights and little else, so everything here serves loads of whole 128-byte lines straight from the
// checkpoint's own layout. In a product lane 4g + t holds 16 bytes of rows g and g + 8; the quad of a row covers 64
// bytes: a step. The dot product may visit k in any order that weights and activations share, so that codes need no
// shuffling.
// Activations keep 22 bits of mantissa as two float16, high + low (with bfloat16 weights 16 bits as two bfloat16): two
// of the tensor core's eight columns each, so that four rows take one product, eight rows two. Weights are exact.
// Unused columns cost nothing: one code for every number of rows, and with it the same bits.
#pragma once
#include "segment.cuh"

constexpr int TILE = 16;      // weight rows
constexpr int MAX_ROWS = 8;   // activation rows
constexpr int SET_ROWS = 4;   // activation rows of one product
constexpr int STEP = 64;      // bytes of a weight row that a quad of lanes multiplies at a time
constexpr int PASS = 128;     // bytes of each of 16 rows that a warp fetches at a time

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

// Eight values times `scale`: the chunk of their high parts to `place`, of the low ones to `place` + stride.
DEVICE void split_eight(uint8_t* place, int stride, const float (&values)[8], float scale, int format) {
    float x[8];
    uint32_t high[4], low[4];
    bool apart = format == NVFP4;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        x[2 * j] = scale * (apart ? values[j] : values[2 * j]);
        x[2 * j + 1] = scale * (apart ? values[j + 4] : values[2 * j + 1]);
    }
    if (format == BF16) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            high[j] = to_bf16x2(x[2 * j], x[2 * j + 1]);
            low[j] = to_bf16x2(x[2 * j] - bf16_low(high[j]), x[2 * j + 1] - bf16_high(high[j]));
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            high[j] = to_half2(x[2 * j], x[2 * j + 1]);
            low[j] = to_half2(x[2 * j] - half_low(high[j]), x[2 * j + 1] - half_high(high[j]));
        }
    }
    *(uint4*)place = make_uint4(high[0], high[1], high[2], high[3]);
    *(uint4*)(place + stride) = make_uint4(low[0], low[1], low[2], low[3]);
}

DEVICE void load_eight(float (&x)[8], const float* address) {
    float4 a = __ldcg((const float4*)address), b = __ldcg((const float4*)address + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// ---- weights -----------------------------------------------------------------------------------------------------

DEVICE int bytes_of(int k, int format) { return format == NVFP4 ? k >> 1 : format == FP8 ? k : 2 * k; }

// 16 weight rows: two runs of eight, 0..7 and 8..15 of a matrix, or eight of a gate and eight of an up projection.
// What a lane copies of them: 16 bytes of every fourth row from lane / 8 on, eight scales of row lane / 2.
struct Tile {
    const uint8_t *low, *high;  // in the first row of each run
    int low_4, high_4;          // bytes from there to the row four further
    const uint8_t* scale;
};

// Eight rows of a matrix from `first` on; those past `last` are read as row `last`: their products are nobody's.
struct Run {
    const uint8_t *weight, *scale;
    uint32_t first, last;
};

DEVICE Tile make_tile(const Run& low, const Run& high, int k, int format) {
    uint32_t lane = threadIdx.x & 31, row = lane >> 3, bytes = bytes_of(k, format), scales = k >> 4;
    auto at = [](const Run& run, uint32_t row) { return min(run.first + row, run.last); };
    uint32_t low_0 = at(low, row), low_4 = at(low, row + 4), high_0 = at(high, row), high_4 = at(high, row + 4);
    uint32_t scale = lane < 16 ? at(low, lane >> 1) : at(high, (lane >> 1) - 8);
    return {low.weight + (lane & 7) * 16 + (uint64_t)low_0 * bytes, high.weight + (lane & 7) * 16 + (uint64_t)high_0 * bytes,
            (int)((low_4 - low_0) * bytes), (int)((high_4 - high_0) * bytes),
            (lane < 16 ? low.scale : high.scale) + (lane & 1) * 8 + (uint64_t)scale * scales};
}

// The same of one matrix, whose tiles are all whole: rows from `row` on, and from `row` + `apart` on.
DEVICE Tile make_whole_tile(const uint8_t* weight, const uint8_t* scale, uint32_t row, int apart, int k, int format) {
    uint32_t lane = threadIdx.x & 31, bytes = bytes_of(k, format);
    const uint8_t* low = weight + (lane & 7) * 16 + (uint64_t)(row + (lane >> 3)) * bytes;
    uint32_t scale_row = row + (lane >> 1) + (lane < 16 ? 0 : apart - 8);
    return {low, low + (uint64_t)bytes * apart, (int)(4 * bytes), (int)(4 * bytes),
            scale + (lane & 1) * 8 + (uint64_t)scale_row * (k >> 4)};
}

// A pass of a warp on its way from global memory, at no cost in registers.
struct Slot {
    uint4 codes[TILE][PASS / 16];  // [row][chunk]; odd rows have their halves exchanged, so that quads do not collide
    uint8_t scales[TILE][PASS / 8];  // E4M3
};
static_assert(sizeof(Slot) == TILE * (PASS + PASS / 8), "as in cuda.py");

// Starts copying the bytes at..at + PASS of the tile's rows; those from `end` on come as zeros.
DEVICE void fetch(Slot& slot, const Tile& tile, int at, int end, int format, uint64_t policy) {
    int lane = threadIdx.x & 31, row = lane >> 3, chunk = lane & 7;
    bool valid = at + chunk * 16 < end;
    uint4* codes = &slot.codes[row][chunk ^ (row & 1) * 4];
    const uint8_t *low = tile.low + at, *high = tile.high + at;
    copy_weights16(codes, low, valid, policy);
    copy_weights16(codes + 4 * PASS / 16, low + tile.low_4, valid, policy);
    copy_weights16(codes + 8 * PASS / 16, high, valid, policy);
    copy_weights16(codes + 12 * PASS / 16, high + tile.high_4, valid, policy);
    if (format == NVFP4) {  // rows start at multiples of four bytes
        uint8_t* scales = &slot.scales[0][0] + lane * 8;
        const uint8_t* scale = tile.scale + (at >> 3);
        int left = (end >> 3) - (at >> 3) - (lane & 1) * 8;
        copy_async4(scales, scale, left > 0);
        copy_async4(scales + 4, scale + 4, left > 4);
    }
}

// Waits for the oldest of `depth` passes, 1..4.
DEVICE void wait_for_pass(int depth) {
    if (depth > 3) copy_wait<3>();
    else if (depth > 2) copy_wait<2>();
    else if (depth > 1) copy_wait<1>();
    else copy_wait<0>();
    __syncwarp();
}

DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// NVFP4: codes become float16 of value * 2^-14, times the E4M3 scale: exact.
constexpr float NVFP4_FACTOR = 16384.f;

// The pairs of nibbles (0, 4), (1, 5), (2, 6), (3, 7) of a word: sign to bit 15, magnitude to bits 9 to 11;
// times one half of `scale`.
template <bool HIGH>
DEVICE void nvfp4_pairs(uint32_t (&pair)[4], uint32_t codes, uint32_t scale) {
    constexpr uint32_t SIGNS = 0x80808080u, HALVES = 0x8e008e00u;
    uint32_t even = select_bits(SIGNS, codes * 16, codes * 2);  // the high bytes of nibbles 0 2 4 6, and bits of others
    uint32_t odd = select_bits(SIGNS, codes, codes >> 3);       // of nibbles 1 3 5 7
    auto times = [&](uint32_t bits) {
        return HIGH ? mul_half2_high(bits & HALVES, scale) : mul_half2_low(bits & HALVES, scale);
    };
    pair[0] = times(even * 256);
    pair[1] = times(odd * 256);
    pair[2] = times(even);
    pair[3] = times(odd);
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

// What a lane multiplies its 16 bytes at `offset` of a weight row with, in loads of 16 bytes: those of the chunk that
// belong to the lane's column of the product.
template <int FORMAT>
DEVICE uint4 fragment(const uint8_t* column, int offset, int j) {
    int chunk = FORMAT == NVFP4 ? offset >> 2 : FORMAT == FP8 ? offset >> 3 : offset >> 4, swap = (chunk >> 2) & 2;
    int place = FORMAT != NVFP4 ? chunk_place(chunk) : 16 * (j < 2 ? chunk + swap : chunk + 2 - swap);
    return *(const uint4*)(column + place + (FORMAT == NVFP4 ? j % 2 : j) * 16);
}

// sums += a pass of weights times the rows. columns: where in `memory` the lane's column of the product is in each set.
// begin, end: the share of the rows in bytes; columns past the last row have no reader.
template <int SETS, int FORMAT>
DEVICE void multiply_pass(Sums<SETS>& sums, const Slot& slot, int at, int begin, int end, const uint8_t* memory,
                          const int (&columns)[SETS]) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int step = 0; step < PASS / STEP; step++) {
        int place = (4 * step + t) ^ (g & 1) * 4, offset = at + step * STEP + t * 16;
        if (offset >= end) offset = begin;  // zeros times anything finite
        uint4 low = slot.codes[g][place], high = slot.codes[g + 8][place];
        if (FORMAT == NVFP4) {
            uint32_t l = e4m3x2_to_half2(((const uint16_t*)slot.scales[g])[step * 4 + t]);
            uint32_t h = e4m3x2_to_half2(((const uint16_t*)slot.scales[g + 8])[step * 4 + t]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t of_low[4], of_high[4];
                if (j < 2) nvfp4_pairs<false>(of_low, word(low, j), l), nvfp4_pairs<false>(of_high, word(high, j), h);
                else nvfp4_pairs<true>(of_low, word(low, j), l), nvfp4_pairs<true>(of_high, word(high, j), h);
                uint32_t a[4] = {of_low[0], of_high[0], of_low[1], of_high[1]};
                uint32_t b[4] = {of_low[2], of_high[2], of_low[3], of_high[3]};
#pragma unroll
                for (int set = 0; set < SETS; set++) {
                    uint4 x = fragment<FORMAT>(memory + columns[set], offset, j);
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
                    uint4 x = fragment<FORMAT>(memory + columns[set], offset, j);
                    mma_half(sums.c[set][2 * j], a[0], x.x, x.y);
                    mma_half(sums.c[set][2 * j + 1], a[1], x.z, x.w);
                }
            }
        } else {
            uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                uint4 x = fragment<FORMAT>(memory + columns[set], offset, 0);
                mma_bf16(sums.c[set][2 * step], a, x.x, x.y);
                mma_bf16(sums.c[set][2 * step + 1], b, x.z, x.w);
            }
        }
    }
}

// Calls `work` with a format known to the compiler: what is in a loop is then one piece.
template <int FORMAT>
struct FormatConstant {
    static constexpr int value = FORMAT;
};
template <typename Work>
DEVICE void with_format(int format, const Work& work) {
    if (format == NVFP4) work(FormatConstant<NVFP4>());
    else if (format == FP8) work(FormatConstant<FP8>());
    else work(FormatConstant<BF16>());
}

// What a product's sums are to be multiplied with, of a format whose second scale is `scale_2`.
DEVICE float factor_of(float scale_2, int format) {
    return format == NVFP4 ? NVFP4_FACTOR * scale_2 : format == FP8 ? scale_2 : 1.f;
}

// Replaces plugins/common.cuh in the emulator: twins of its functions with inline assembly, and the rest of it as is.
// tests/emulator.py drops from the included header every function whose body holds `asm`.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;

inline void wait_for_previous() { emulator_wait_for_previous(); }
inline void launch_next() { emulator_launch_next(); }

// ---- conversions: to nearest even, subnormals kept; a NaN becomes 0x7fff as on the GPU --------------------------

inline uint32_t emulator_to_bf16(float value) {
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline uint32_t to_bf16x2(float low, float high) { return emulator_to_bf16(high) << 16 | emulator_to_bf16(low); }

inline uint16_t to_half(float value) {
    uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fffu;
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and up
    if (bits < 0x38800000u)                                      // below 2^-14: 0.5 has the quantum of subnormals
        return (uint16_t)(sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1)) >> 13);
}

inline uint32_t to_half2(float low, float high) { return (uint32_t)to_half(high) << 16 | to_half(low); }

inline float half_to_float(uint16_t bits) {
    uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) return __uint_as_float(sign | 0x70000000u | magnitude);  // infinity and NaN
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 5.192296858534828e33f));  // 2^112
}

inline uint32_t mul_half2(uint32_t a, uint32_t b) {  // a product of two halves is exact in float
    return to_half2(half_to_float((uint16_t)a) * half_to_float((uint16_t)b),
                    half_to_float((uint16_t)(a >> 16)) * half_to_float((uint16_t)(b >> 16)));
}

inline uint32_t mul_half2_low(uint32_t a, uint32_t b) { return mul_half2(a, (b & 0xffffu) * 0x10001u); }
inline uint32_t mul_half2_high(uint32_t a, uint32_t b) { return mul_half2(a, (b >> 16) * 0x10001u); }

inline uint32_t e4m3x2_to_half2(uint16_t bytes) {
    float value[2];
    for (int i = 0; i < 2; i++) {
        uint32_t byte = bytes >> 8 * i & 0xffu;
        value[i] = __uint_as_float((byte & 0x7fu) << 20 | (byte & 0x80u) << 24) * 1.329227995784916e36f;  // 2^120
    }
    return to_half2(value[0], value[1]);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline void prefetch_line(const void* address) { (void)*(const volatile uint8_t*)address; }
inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

// ---- tensor cores: the exact sum of products, rounded once with c (the GPU rounds a little differently) ---------

struct EmulatorMma {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

template <float (*CONVERT)(uint16_t)>
__attribute__((optimize("O3"))) void emulator_mma(void** operands, unsigned) {
    double a[16][16], b[16][8], sums[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
        const EmulatorMma* own = (const EmulatorMma*)operands[lane];
        int group = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
                a[group + i % 2 * 8][pair + i / 2 * 8 + half] = CONVERT((uint16_t)(own->a[i] >> 16 * half));
            for (int i = 0; i < 2; i++) b[pair + i * 8 + half][group] = CONVERT((uint16_t)(own->b[i] >> 16 * half));
        }
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
        float* c = ((const EmulatorMma*)operands[lane])->c;
        for (int i = 0; i < 4; i++) c[i] = (float)(c[i] + sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
}

inline float emulator_bf16_to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    EmulatorMma operands{c, a, {b0, b1}};
    emulator_collective(0xffffffffu, emulator_mma<emulator_bf16_to_float>, &operands);
}
inline void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    EmulatorMma operands{c, a, {b0, b1}};
    emulator_collective(0xffffffffu, emulator_mma<half_to_float>, &operands);
}

struct EmulatorMatrixLoad {
    uint32_t* r;
    const uint16_t* row;
};

template <int COUNT, bool TRANSPOSED>
void emulator_load_matrices(void** operands, unsigned) {
    for (int lane = 0; lane < 32; lane++) {
        for (int matrix = 0; matrix < COUNT; matrix++) {
            uint32_t value = 0;
            for (int half = 0; half < 2; half++) {
                int row = lane / 4, column = lane % 4 * 2 + half;
                int line = matrix * 8 + (TRANSPOSED ? column : row);
                const uint16_t* elements = ((const EmulatorMatrixLoad*)operands[line])->row;
                value |= (uint32_t)elements[TRANSPOSED ? row : column] << 16 * half;
            }
            ((const EmulatorMatrixLoad*)operands[lane])->r[matrix] = value;
        }
    }
}

template <int COUNT, bool TRANSPOSED>
inline void emulator_load_matrix(uint32_t* r, const void* row) {
    EmulatorMatrixLoad operands{r, (const uint16_t*)row};
    if (emulator_lane() < 8 * COUNT) {  // the addresses of the other lanes are not used
        emulator_shared_offset(row);
        if ((unsigned long long)row % 16) emulator_fail("a row of load_matrix is not aligned to 16 bytes");
    }
    emulator_collective(0xffffffffu, emulator_load_matrices<COUNT, TRANSPOSED>, &operands);
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { emulator_load_matrix<4, false>(r, row); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) { emulator_load_matrix<4, true>(r, row); }
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) { emulator_load_matrix<2, false>(r, row); }
inline void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) { emulator_load_matrix<2, true>(r, row); }

// ---- memory ------------------------------------------------------------------------------------------------------

inline uint4 load_weights(const void* address) {
    if ((unsigned long long)address % 16) emulator_fail("load_weights: an address that is not aligned to 16 bytes");
    return *(const uint4*)address;
}

inline void copy_async16(void* shared, const void* global, bool valid) { emulator_copy(shared, global, 16, valid); }
inline void copy_async4(void* shared, const void* global, bool valid) { emulator_copy(shared, global, 4, valid); }
inline uint64_t evict_first() { return 0; }
inline void copy_weights16(void* shared, const void* global, bool valid, uint64_t) {
    emulator_copy(shared, global, 16, valid);
}
inline void copy_commit() { emulator_copy_commit(); }
template <int PENDING>
inline void copy_wait() {
    emulator_copy_wait(PENDING);
}

#include "../../plugins/common.cuh"

// What the kernels share: conversions, reductions, the tensor core instruction, programmatic launches.
//
// Compiled by NVRTC (plugins/kernels.py) with no other header. Kernels take raw pointers and know nothing of torch.
// A row's bits must not depend on the other rows of a call: sums run in one fixed order, and nothing here uses a
// floating point atomic.
#pragma once

#ifdef __CUDACC_RTC__  // which has no standard headers
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef long int64_t;
#else
#include <cstdint>
#endif

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

constexpr uint32_t ALL_LANES = 0xffffffffu;

// ---- programmatic dependent launch -------------------------------------------------------------------------------
// Every kernel calls wait_for_previous() in every thread before it reads what an earlier kernel of the round wrote, or
// writes what one reads. launch_next() lets the next kernel's blocks start where there is room. Most kernels call it
// first; in every layer one or two late kernels (router and experts_up, or a dense MLP's first product), and others where
// nothing is gained, call it after the wait. When a kernel starts, all those before the last late one have completed,
// that one perhaps not: what they wrote, and the weights, may be read before the wait, and what only they read written.

DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- conversions -------------------------------------------------------------------------------------------------

DEVICE float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to bfloat16, `low` in the low half.
DEVICE uint32_t to_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE uint32_t to_half2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE uint16_t to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

DEVICE float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE float half_low(uint32_t pair) { return half_to_float((uint16_t)pair); }
DEVICE float half_high(uint32_t pair) { return half_to_float((uint16_t)(pair >> 16)); }

// The largest finite float16 instead of infinity.
DEVICE float clamp_half(float value) { return fminf(fmaxf(value, -65504.f), 65504.f); }

DEVICE uint32_t mul_half2(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// A pair times the low, or the high, half of another.
DEVICE uint32_t mul_half2_low(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("{.reg .b16 l, h; .reg .b32 s; mov.b32 {l, h}, %2; mov.b32 s, {l, l}; mul.rn.f16x2 %0, %1, s;}"
        : "=r"(product) : "r"(a), "r"(b));
    return product;
}
DEVICE uint32_t mul_half2_high(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("{.reg .b16 l, h; .reg .b32 s; mov.b32 {l, h}, %2; mov.b32 s, {h, h}; mul.rn.f16x2 %0, %1, s;}"
        : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// A float as an E4M3 byte: to nearest even, what is too large (and NaN) as 448.
DEVICE uint32_t to_e4m3(float value) {
    uint32_t sign = (__float_as_uint(value) >> 24) & 0x80u;
    float magnitude = fminf(__uint_as_float(__float_as_uint(value) & 0x7fffffffu), 448.f);
    uint32_t bits = __float_as_uint(magnitude);
    if (magnitude < 0.015625f)  // subnormal codes count steps of 2^-9, which is the last place of 2^14
        return sign | (__float_as_uint(magnitude + 16384.f) - __float_as_uint(16384.f));
    return sign | (((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3));
}

// Four E4M3 bytes of a word: the first and third, or the second and fourth, as half2. NaN codes read as 480.
DEVICE uint32_t e4m3_odd_half2(uint32_t word) {
    uint32_t bits = (word & 0x80008000u) | ((word & 0x7f007f00u) >> 1);
    return mul_half2(bits, 0x5c005c00u);  // 2^8: the difference of the exponents' biases
}
DEVICE uint32_t e4m3_even_half2(uint32_t word) { return e4m3_odd_half2(word << 8); }

// Two E4M3 bytes as half2, the first in the low half; NaN codes read as anything.
DEVICE uint32_t e4m3x2_to_half2(uint16_t bytes) {
#if __CUDA_ARCH__ >= 890
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bytes));
    return pair;
#else
    return e4m3_odd_half2(__byte_perm(bytes, 0, 0x1404));
#endif
}

// Bits of `a` where the mask has ones, of `b` elsewhere, in one instruction.
DEVICE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(bits) : "r"(mask), "r"(a), "r"(b));
    return bits;
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }

// 2^x, the last bits rough; below 2^-126 zero.
DEVICE float exp2_fast(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

// ---- tensor cores ------------------------------------------------------------------------------------------------
// c[16, 8] += a[16, 16] b[16, 8]. With g = lane / 4 and t = lane % 4: a = {row g | k 2t, 2t+1}, {g+8 | same k},
// {g | k 2t+8, 2t+9}, {g+8 | same}; b = {k 2t, 2t+1 | column g}, {k 2t+8, 2t+9 | column g}; c = {g | columns 2t, 2t+1},
// {g+8 | same}. A column of c depends on that column of b alone.

DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- memory ------------------------------------------------------------------------------------------------------

// Weights: read once a round, so not worth a place in the first-level cache.
DEVICE uint4 load_weights(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

DEVICE void copy_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0));
}
DEVICE void copy_async4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0));
}

// Weights are read once a round: they are the first to leave the second-level cache, which keeps the rows, and the
// kernels' code, in it.
DEVICE uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE void copy_weights16(void* shared, const void* global, bool valid, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0), "l"(policy));
}
// Memory that a later launch will read: to the second-level cache, while nothing else keeps memory busy.
struct Ahead {
    const uint8_t* start[4];
    int bytes[4];
};
DEVICE void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory"); }
DEVICE void fetch_ahead(const Ahead& ahead) {
    constexpr int LINE = 128;
#pragma unroll 1
    for (int i = 0; i < 4; i++)
        for (int at = (blockIdx.x * blockDim.x + threadIdx.x) * LINE; at < ahead.bytes[i]; at += gridDim.x * blockDim.x * LINE)
            prefetch_line(ahead.start[i] + at);
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// 8x8 matrices of 16-bit elements from shared memory: ldmatrix. Lane i gives the address of row i % 8 of matrix i / 8,
// aligned to 16 bytes; r[j] is matrix j's {row g | columns 2t, 2t+1}, transposed {rows 2t, 2t+1 | column g}.

DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

#include "marks.cuh"

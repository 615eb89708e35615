// The CUDA language for a C++ compiler: what NVRTC knows without any header, on top of runtime.cpp.
//
// tests/emulator.py puts this in front of a preprocessed kernel source. No standard headers: a kernel's names are its
// own, as under NVRTC. A lane meets the others of its warp in emulator_collective: each gives a pointer to its
// operands, the last to arrive computes everybody's results.
#pragma once

// ---- what runtime.cpp provides -----------------------------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};

struct EmulatorSlot {  // where a static shared variable lies in the block of this number
    unsigned block, offset;
};

extern "C" {
extern uint3 threadIdx, blockIdx, blockDim, gridDim;
extern unsigned char emulator_dynamic[];
[[noreturn]] void emulator_fail(const char* message);
void emulator_barrier(unsigned barrier, unsigned threads);  // threads: 0 for all of the block
void emulator_collective(unsigned mask, void (*combine)(void** operands, unsigned mask), void* operands);
void emulator_yield();
void emulator_wait_for_previous();
void emulator_launch_next();
void emulator_copy(void* shared, const void* global, unsigned size, bool valid);
void emulator_copy_commit();
void emulator_copy_wait(unsigned pending);
unsigned long long emulator_shared_offset(const void* pointer);
void* emulator_shared_pointer(unsigned offset);
void* emulator_static(EmulatorSlot* slot, unsigned size, unsigned align);
unsigned emulator_lane();

float expf(float), exp2f(float), expm1f(float), logf(float), log2f(float), log10f(float), log1pf(float), sqrtf(float);
float sinf(float), cosf(float), tanhf(float), erff(float), floorf(float), ceilf(float), rintf(float), roundf(float);
float truncf(float), fabsf(float), fmaxf(float, float), fminf(float, float), fmaf(float, float, float);
float powf(float, float), fmodf(float, float), copysignf(float, float), ldexpf(float, int);
double exp(double), log(double), sqrt(double), pow(double, double), fabs(double), floor(double), sin(double);
double cos(double), rint(double), fma(double, double, double), frexp(double, int*), ldexp(double, int);
void sincosf(float, float*, float*);
int abs(int);
int printf(const char*, ...);
}

constexpr int warpSize = 32;

// ---- vector types ------------------------------------------------------------------------------------------------

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

#define EMULATOR_VECTORS(name, type)                                                                              \
    struct __attribute__((aligned(2 * sizeof(type)))) name##2 { type x, y; };                                     \
    struct __attribute__((aligned(sizeof(type) < 8 ? 4 * sizeof(type) : 16))) name##4 { type x, y, z, w; };       \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                              \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(char, signed char)
EMULATOR_VECTORS(uchar, unsigned char)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(ushort, unsigned short)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(uint, unsigned)
EMULATOR_VECTORS(longlong, long long)
EMULATOR_VECTORS(ulonglong, unsigned long long)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
#undef EMULATOR_VECTORS

struct int3 {
    int x, y, z;
};
struct float3 {
    float x, y, z;
};
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

// ---- bits and arithmetic -----------------------------------------------------------------------------------------

template <typename To, typename From>
inline To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator_bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; bit++) reversed |= (x >> bit & 1) << (31 - bit);
    return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned choice = selector >> 4 * i;
        unsigned byte = bytes >> 8 * (choice & 7) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline int __mulhi(int a, int b) { return (long long)a * b >> 32; }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return ((unsigned long long)high << 32 | low) << (shift & 31) >> 32;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return ((unsigned long long)high << 32 | low) >> (shift & 31);
}

// The usual arithmetic conversions decide the type, as CUDA's overloads do.
template <typename A, typename B>
inline auto min(A a, B b) -> decltype(a + b) {
    return (decltype(a + b))b < (decltype(a + b))a ? b : a;
}
template <typename A, typename B>
inline auto max(A a, B b) -> decltype(a + b) {
    return (decltype(a + b))a < (decltype(a + b))b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float abs(float x) { return fabsf(x); }
inline long long abs(long long x) { return x < 0 ? -x : x; }

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }

inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline void __sincosf(float x, float* sine, float* cosine) { sincosf(x, sine, cosine); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.f), 1.f); }

template <typename To>
inline To emulator_saturate(double x, double low, double high) {  // CUDA's conversions: NaN to 0, the rest to the range
    return x != x ? 0 : x <= low ? (To)low : x >= high ? (To)high : (To)x;
}
inline int __float2int_rn(float x) { return emulator_saturate<int>(rintf(x), -2147483648., 2147483647.); }
inline int __float2int_rz(float x) { return emulator_saturate<int>(truncf(x), -2147483648., 2147483647.); }
inline int __float2int_rd(float x) { return emulator_saturate<int>(floorf(x), -2147483648., 2147483647.); }
inline int __float2int_ru(float x) { return emulator_saturate<int>(ceilf(x), -2147483648., 2147483647.); }
inline unsigned __float2uint_rn(float x) { return emulator_saturate<unsigned>(rintf(x), 0., 4294967295.); }
inline unsigned __float2uint_rz(float x) { return emulator_saturate<unsigned>(truncf(x), 0., 4294967295.); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

// ---- memory ------------------------------------------------------------------------------------------------------

template <typename T>
inline T __ldg(const T* address) { return *address; }
template <typename T>
inline T __ldcs(const T* address) { return *address; }
template <typename T>
inline T __ldcg(const T* address) { return *address; }
template <typename T, typename V>
inline void __stcs(T* address, V value) { *address = value; }
template <typename T, typename V>
inline void __stcg(T* address, V value) { *address = value; }

// Addresses of shared memory are 32 bits wide, as on the GPU: kernels may compute with them.
inline unsigned long long __cvta_generic_to_shared(const void* pointer) { return emulator_shared_offset(pointer); }

// One thread runs at a time, so an atomic operation is a plain one.
#define EMULATOR_ATOMIC(name, expression)         \
    template <typename T, typename V>             \
    inline T name(T* address, V operand) {        \
        T old = *address, value = (T)operand;     \
        *address = expression;                    \
        return old;                               \
    }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMax, value > old ? value : old)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef EMULATOR_ATOMIC
template <typename T, typename C, typename V>
inline T atomicCAS(T* address, C compare, V value) {
    T old = *address;
    if (old == (T)compare) *address = (T)value;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline long long clock64() {
    static long long ticks;
    return ticks += 100;
}
inline unsigned clock() { return (unsigned)clock64(); }
inline void __nanosleep(unsigned) { emulator_yield(); }
[[noreturn]] inline void __trap() { emulator_fail("__trap()"); }

// ---- meetings ----------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator_barrier(0, 0); }

template <typename T>
struct EmulatorShuffle {
    T value, result;
    unsigned source;
    static void combine(void** operands, unsigned mask) {
        for (unsigned lane = 0; lane < 32; lane++) {
            if (!(mask >> lane & 1)) continue;
            EmulatorShuffle* own = (EmulatorShuffle*)operands[lane];
            if (!(mask >> own->source & 1)) emulator_fail("a shuffle reads a lane that is not in its mask");
            own->result = ((EmulatorShuffle*)operands[own->source])->value;
        }
    }
};
template <typename T>
inline T emulator_shuffle(unsigned mask, T value, unsigned source) {
    EmulatorShuffle<T> operands{value, value, source};
    emulator_collective(mask, EmulatorShuffle<T>::combine, &operands);
    return operands.result;
}
// A lane whose source lies outside its segment of `width` lanes keeps its own value.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emulator_shuffle(mask, value, (emulator_lane() & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned lane = emulator_lane(), source = lane ^ bits;
    return emulator_shuffle(mask, value, source > (lane | (width - 1)) || source > 31 ? lane : source);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emulator_lane(), source = lane + delta;
    return emulator_shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emulator_lane();
    return emulator_shuffle(mask, value, lane < (lane & ~(width - 1)) + delta ? lane : lane - delta);
}

struct EmulatorReduction {
    unsigned long long value, result;
};
// `fold` joins two operands; every lane gets the result over the mask, its own value shifted to its bit for a ballot.
template <typename Fold>
inline unsigned long long emulator_reduce(unsigned mask, unsigned long long value, Fold) {
    EmulatorReduction operands{value, 0};
    emulator_collective(
        mask,
        [](void** all, unsigned lanes) {
            unsigned first = __builtin_ctz(lanes);
            unsigned long long total = ((EmulatorReduction*)all[first])->value;
            for (unsigned lane = first + 1; lane < 32; lane++)
                if (lanes >> lane & 1) total = Fold::fold(total, ((EmulatorReduction*)all[lane])->value);
            for (unsigned lane = 0; lane < 32; lane++)
                if (lanes >> lane & 1) ((EmulatorReduction*)all[lane])->result = total;
        },
        &operands);
    return operands.result;
}
#define EMULATOR_FOLD(name, type, expression)                                                  \
    struct name {                                                                              \
        static unsigned long long fold(unsigned long long left, unsigned long long right) {    \
            type a = (type)left, b = (type)right;                                              \
            return (unsigned long long)(type)(expression);                                     \
        }                                                                                      \
    };
EMULATOR_FOLD(EmulatorBallot, unsigned, a | b)
EMULATOR_FOLD(EmulatorAny, unsigned, a | b)
EMULATOR_FOLD(EmulatorAll, unsigned, a & b)
EMULATOR_FOLD(EmulatorSync, unsigned, 0)
EMULATOR_FOLD(EmulatorAdd, unsigned, a + b)
EMULATOR_FOLD(EmulatorAnd, unsigned, a & b)
EMULATOR_FOLD(EmulatorOr, unsigned, a | b)
EMULATOR_FOLD(EmulatorXor, unsigned, a ^ b)
EMULATOR_FOLD(EmulatorMax, unsigned, a > b ? a : b)
EMULATOR_FOLD(EmulatorMin, unsigned, a < b ? a : b)
EMULATOR_FOLD(EmulatorSignedMax, int, a > b ? a : b)
EMULATOR_FOLD(EmulatorSignedMin, int, a < b ? a : b)
#undef EMULATOR_FOLD
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator_reduce(mask, 0, EmulatorSync{}); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulator_reduce(mask, (unsigned)(predicate != 0) << emulator_lane(), EmulatorBallot{});
}
inline int __any_sync(unsigned mask, int predicate) { return emulator_reduce(mask, predicate != 0, EmulatorAny{}); }
inline int __all_sync(unsigned mask, int predicate) { return emulator_reduce(mask, predicate != 0, EmulatorAll{}); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) { return emulator_reduce(mask, value, EmulatorAdd{}); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) { return emulator_reduce(mask, value, EmulatorAnd{}); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) { return emulator_reduce(mask, value, EmulatorOr{}); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) { return emulator_reduce(mask, value, EmulatorXor{}); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) { return emulator_reduce(mask, value, EmulatorMax{}); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) { return emulator_reduce(mask, value, EmulatorMin{}); }
inline int __reduce_add_sync(unsigned mask, int value) { return (int)emulator_reduce(mask, value, EmulatorAdd{}); }
inline int __reduce_max_sync(unsigned mask, int value) {
    return (int)emulator_reduce(mask, value, EmulatorSignedMax{});
}
inline int __reduce_min_sync(unsigned mask, int value) {
    return (int)emulator_reduce(mask, value, EmulatorSignedMin{});
}

// ---- how the test's side calls a kernel --------------------------------------------------------------------------

template <unsigned... Index>
struct EmulatorIndices {};
template <typename... Args, unsigned... Index>
inline void emulator_call(void (*kernel)(Args...), void** args, EmulatorIndices<Index...>) {
    kernel(*(Args*)args[Index]...);
}
template <typename... Args>
inline void emulator_call(void (*kernel)(Args...), void** args) {
    emulator_call(kernel, args, EmulatorIndices<__integer_pack(sizeof...(Args))...>{});
}
// The sizes of the arguments in bytes, then 0.
template <typename... Args>
inline const unsigned* emulator_sizes(void (*)(Args...)) {
    static const unsigned sizes[] = {sizeof(Args)..., 0};
    return sizes;
}

// ---- keywords: last, for they must not touch the lines above -----------------------------------------------------

#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// Activations as the prefill kernels take and give them: float32 to float16 and back. Launcher: plugins/convert.py.
#include <common.cuh>  // not the one beside this file, but the include path's, as in the emulator

constexpr int THREADS = 256;

// hi: the float16 nearest x; lo: what that rounded off, or null. A thread has four values.
KERNEL __launch_bounds__(THREADS) to_halves(const float4* x, uint2* hi, uint2* lo, int64_t fours) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    wait_for_previous();
    launch_next();
    if (i >= fours) return;
    float4 v = x[i];
    uint2 high = {to_half2(clamp_half(v.x), clamp_half(v.y)), to_half2(clamp_half(v.z), clamp_half(v.w))};
    hi[i] = high;
    if (!lo) return;
    float rest[4] = {v.x - half_low(high.x), v.y - half_high(high.x), v.z - half_low(high.y), v.w - half_high(high.y)};
    lo[i] = {to_half2(clamp_half(rest[0]), clamp_half(rest[1])), to_half2(clamp_half(rest[2]), clamp_half(rest[3]))};
}

KERNEL __launch_bounds__(THREADS) to_floats(const uint2* x, float4* y, int64_t fours) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    wait_for_previous();
    launch_next();
    if (i >= fours) return;
    uint2 v = x[i];
    y[i] = {half_low(v.x), half_high(v.x), half_low(v.y), half_high(v.y)};
}

// Zero-centred RMS norm of rows in float32; plugins/rms_norm/__init__.py has the math. Launcher: launch.py.
#include "common.cuh"

constexpr int THREADS = 256;

// A block for each row.
KERNEL __launch_bounds__(THREADS) rms_norm(
    const float* x,       // [rows, D], as y
    const float* weight,  // [D]
    float* y,
    int size,             // D
    float epsilon) {
    __shared__ float parts[THREADS / 32];
    wait_for_previous();
    launch_next();
    x += (int64_t)blockIdx.x * size, y += (int64_t)blockIdx.x * size;
    float squares = 0.f;
    for (int i = threadIdx.x; i < size; i += THREADS) squares += x[i] * x[i];
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) total += parts[i];
    float scale = rsqrtf(total / (float)size + epsilon);
    for (int i = threadIdx.x; i < size; i += THREADS) y[i] = x[i] * scale * (1.f + weight[i]);
}

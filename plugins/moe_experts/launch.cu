// What the experts' kernels need before they run as a plugin: they choose the experts themselves, from logits, and add
// to y. Launcher: plugins/moe_experts/launch.py.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr float LEAST = -1e30f;  // the logit of an expert that is chosen with weight zero

// A block for each row: logits whose choice and softmax are the row's experts and weights, minus infinity for all
// others; zeros for y and, unless null, for the shared experts' gates. The kernels after it read some of this, and x,
// before their wait, so it starts them only after its own.
KERNEL __launch_bounds__(THREADS) experts_prepare(
    const float* topk_weights,  // [T, k]
    const int64_t* topk_ids,    // [T, k]
    float* logits,              // [T, E]
    float* y,                   // [T, H]
    float* gates,               // [T]
    int experts,
    int top_k,
    int hidden) {
    int64_t row = blockIdx.x;
    wait_for_previous();
    launch_next();
    float* own = logits + row * experts;
    for (int i = threadIdx.x; i < experts; i += THREADS) own[i] = __uint_as_float(0xff800000u);
    for (int i = threadIdx.x; i < hidden; i += THREADS) y[row * hidden + i] = 0.f;
    if (gates && threadIdx.x == 0) gates[row] = 0.f;
    __syncthreads();
    int64_t pair = row * top_k + threadIdx.x;
    if (threadIdx.x < top_k) own[topk_ids[pair]] = fmaxf(logf(topk_weights[pair]), LEAST);
}

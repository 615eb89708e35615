// The top k experts of every row, and their weights, from the router's logits. Macros: NUM_EXPERTS, TOP_K.
#include "moe_routing/routing.cuh"

constexpr int WARPS = 8;

// A warp for each row.
KERNEL __launch_bounds__(32 * WARPS) moe_choose(
    const float* logits,  // [T, NUM_EXPERTS]
    float* topk_weights,  // [T, TOP_K], falling
    int64_t* topk_ids,    // [T, TOP_K]
    int rows) {
    __shared__ int ids[WARPS][TOP_K];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * WARPS + warp;
    wait_for_previous();
    launch_next();
    if (row >= rows) return;
    Keys keys;
    keys.load(logits + (int64_t)row * NUM_EXPERTS);
    pick_experts(keys, ids[warp]);
    __syncwarp();
    keys.weigh(topk_weights + (int64_t)row * TOP_K);
    if (lane < TOP_K) topk_ids[(int64_t)row * TOP_K + lane] = ids[warp][lane];
}

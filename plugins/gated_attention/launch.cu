// RoPE's inverse frequencies, from the launch to device memory. Launcher: plugins/gated_attention/launch.py.
#include "common.cuh"

constexpr int MAX_FREQUENCIES = 128;
struct Frequencies {
    float value[MAX_FREQUENCIES];
};

// One block. Reads nothing that the attention's kernels read before they wait, and starts them after its own wait.
KERNEL __launch_bounds__(MAX_FREQUENCIES) put_frequencies(
    const __grid_constant__ Frequencies frequencies, float* out, int count) {
    wait_for_previous();
    launch_next();
    if (threadIdx.x < count) out[threadIdx.x] = frequencies.value[threadIdx.x];
}

// The Gated DeltaNet mixer as a plugin: its four inputs into rows of projections, and the norm of each head at the end.
// Launcher: plugins/gated_delta_net/launch.py.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int INPUTS = 4;

struct PackArguments {
    const float* input[INPUTS];  // [T, width]: qkv_in, z, b, a
    int width[INPUTS];
    float* rows;          // [.., stride]: the inputs' rows side by side
    const int* position;  // null, or input row t goes to row (position + t) & mask
    int stride;
    int mask;
    int first;            // input row
    int padding;
};

// A block for each input row from `first` on. The mixer's kernels read and write their memory before they wait, so this starts them only after its own.
KERNEL __launch_bounds__(THREADS) gdn_pack(const __grid_constant__ PackArguments a) {
    int row = a.first + blockIdx.x;
    wait_for_previous();
    launch_next();
    int to = a.position ? (*a.position + row) & a.mask : row;
    float* out = a.rows + (int64_t)to * a.stride;
#pragma unroll
    for (int i = 0; i < INPUTS; i++) {
        const float* from = a.input[i] + (int64_t)row * a.width[i];
        for (int j = threadIdx.x; j < a.width[i]; j += THREADS) out[j] = from[j];
        out += a.width[i];
    }
}

// Divides every head of y by the root mean square of which gdn_decode left the sums of squares. Grid (T, Hv).
KERNEL __launch_bounds__(THREADS) gdn_divide(
    float* y,              // [T, Hv, Dv]
    const float* squares,  // [T, Hv, parts]
    int head_dim,
    int parts,
    float epsilon) {
    int64_t head = (int64_t)blockIdx.x * gridDim.y + blockIdx.y;
    wait_for_previous();
    launch_next();
    float sum = 0.f;
    for (int i = 0; i < parts; i++) sum += squares[head * parts + i];
    float factor = rsqrtf(sum / (float)head_dim + epsilon);
    for (int i = threadIdx.x; i < head_dim; i += THREADS) y[head * head_dim + i] *= factor;
}

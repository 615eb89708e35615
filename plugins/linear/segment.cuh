// A segment: one weight matrix, or a gate/up pair, that a launch multiplies its rows with. A launch takes several, so
// that the projections of one input share its staging and a grid. Mirrored by plugins/linear/cuda.py.
#pragma once
#include "common.cuh"

enum Format : int { BF16 = 0, FP8 = 1, NVFP4 = 2 };      // weight formats of plugins/linear
enum Epilogue : int { STORE = 0, ADD = 1, SWIGLU = 2 };  // y = xWᵀ; y += xWᵀ; y = silu(x gateᵀ) * (x upᵀ)

struct Segment {
    const uint8_t* weight;    // [N, K] in its format, row-major; SWIGLU: the gate's
    const uint8_t* weight_up; // SWIGLU only
    const uint8_t* scale;     // NVFP4: E4M3 [N, K / 16]
    const uint8_t* scale_up;
    const float* scale_2;     // FP8 and NVFP4: one float
    const float* scale_2_up;
    void* out;                // [T, out_stride]
    int out_stride;           // elements
    int n;                    // rows of the weight (of the gate's)
    int format;
    int epilogue;
    int ring_mask;            // row t goes to row (position + t) & ring_mask where this is not zero
    int precise;              // prefill: also multiply what float16 rounds off the rows
};
constexpr int MAX_SEGMENTS = 4;
struct Segments {
    Segment segment[MAX_SEGMENTS];
    int count;
    int padding;
};

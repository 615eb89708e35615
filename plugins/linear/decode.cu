// Linear layers on 1..8 rows: several weight matrices of any format over one input, norms fused in front, residual,
// SwiGLU or the choice of experts behind. Replaces FloatLinear, Fp8Linear, Nvfp4Linear, ZeroCenteredRmsNorm and
// MoeRouting of plugins/ in a decoding step.
//
// A block stages the rows, then goes from tile to tile (16 weight rows); its warps share the tile's k. The weights of
// the next tile are on their way while this one is multiplied, those of the first before the previous kernel has
// ended.
#include "linear/stage.cuh"
#include "moe_routing/routing.cuh"

struct LinearArguments {
    Segments segments;
    Input input;
    const float* residual;    // ADD: out = residual + product, row (t + *residual_row)
    const int* residual_row;  // null: 0
    float* normed;            // null, or the staged input in float32, [T, K]: the norm's output
    RoutingArguments routing; // routing.logits null: none
};

DEVICE int tiles_of(const Segment& s) { return s.epilogue == SWIGLU ? (s.n + 7) / 8 : (s.n + 15) / 16; }

DEVICE Tile find_tile(const Segments& segments, int index, int k) {
    int i = 0;
    while (index >= tiles_of(segments.segment[i])) index -= tiles_of(segments.segment[i++]);
    const Segment& s = segments.segment[i];
    bool pair = s.epilogue == SWIGLU;
    return make_tile(s.weight, s.scale, pair ? s.weight_up : 0, s.scale_up, index * (pair ? 8 : 16), s.n, k, s.format, i);
}

// What a thread that finishes one value of a tile needs, where it has one.
struct Prepared {
    bool valid;
    int slot;
    float factor, factor_up, residual;
};

DEVICE Prepared prepare(const LinearArguments& a, const Staged& staged, const Tile& tile, int thread) {
    const Segment& s = a.segments.segment[tile.id];
    bool pair = s.epilogue == SWIGLU;
    int row = thread / (pair ? 8 : 16), n = tile.first + thread % (pair ? 8 : 16);
    Prepared p = {row < a.input.rows && n < s.n, row, 0.f, 0.f, 0.f};
    if (!p.valid) return p;
    p.factor = p.factor_up = rms_factor(staged, a.input, row);
    p.factor *= factor_of(s.format, s.scale_2);
    if (pair) p.factor_up *= factor_of(s.format, s.scale_2_up);
    if (s.ring_mask) p.slot = (__ldcg(a.input.position) + row) & s.ring_mask;
    int from = a.residual_row ? row + __ldcg(a.residual_row) : row;
    if (s.epilogue == ADD) p.residual = __ldcg(a.residual + (int64_t)from * s.out_stride + n);
    return p;
}

DEVICE void finish(const LinearArguments& a, const Tile& tile, int thread, const Partial& partial, const Prepared& p) {
    if (!p.valid) return;
    const Segment& s = a.segments.segment[tile.id];
    bool pair = s.epilogue == SWIGLU;
    int tile_row = thread % (pair ? 8 : 16), row = thread / (pair ? 8 : 16), n = tile.first + tile_row;
    float y = partial.get(tile_row, row) * p.factor;
    if (pair) y = silu(y) * (partial.get(tile_row + 8, row) * p.factor_up);
    y += p.residual;
    if (s.pack) put_value((uint4*)s.out + (int64_t)p.slot * (s.out_stride / 4), n, y, s.pack == 2);
    else ((float*)s.out)[(int64_t)p.slot * s.out_stride + n] = y;
}

DEVICE void write_normed(const LinearArguments& a, const Staged& staged) {
    const Input& in = a.input;
    for (int i = threadIdx.x; i < in.rows * in.k; i += THREADS) {
        int row = i / in.k, k = i % in.k;
        float x = __ldcg(in.x + (int64_t)row * in.x_stride + k);
        a.normed[i] = x * (1.f + in.norm_weight[k]) * rms_factor(staged, in, row);
    }
}

KERNEL __launch_bounds__(THREADS, RESIDENT) linear(const __grid_constant__ LinearArguments a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Staged staged;
    const Segments& segments = a.segments;
    auto total = [&] {
        int tiles = 0;
        for (int i = 0; i < segments.count; i++) tiles += tiles_of(segments.segment[i]);
        return tiles;
    };
    auto find = [&](int index) { return find_tile(segments, index, a.input.k); };
    auto started = [&] {
        if (a.normed && blockIdx.x == 0) write_normed(a, staged);
    };
    auto prepare_value = [&](const Tile& tile, int thread) { return prepare(a, staged, tile, thread); };
    auto finish_value = [&](const Tile& tile, int thread, const Partial& partial, const Prepared& p) {
        finish(a, tile, thread, partial, p);
    };
    auto turned = [&](int index) {
        if (a.routing.logits && index < tiles_of(segments.segment[0]))
            route_when_last(a.routing, a.input.rows, (tiles_of(segments.segment[0]) + a.input.groups - 1) / a.input.groups);
    };
    go_through_tiles<true>(a.input, shared_memory, staged, total, find, started, prepare_value, finish_value, turned);
}

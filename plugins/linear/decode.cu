// Linear layers on 1..8 rows: several weight matrices of any format over one input, norms fused in front, residual or
// SwiGLU behind. Replaces FloatLinear, Fp8Linear, Nvfp4Linear and ZeroCenteredRmsNorm of plugins/ in a decoding step.
//
// A block stages the rows, then goes from tile to tile (16 weight rows); its warps share the tile's k. The weights of
// the next tile are on their way while this one is multiplied, those of the first before the previous kernel has
// ended.
#include "linear/stage.cuh"

struct LinearArguments {
    Segments segments;
    Input input;
    const float* residual;    // ADD: out = residual + product, row (t + *residual_row)
    const int* residual_row;  // null: 0
    float* normed;            // null, or the staged input in float32, [T, K]: the norm's output
};

DEVICE int tile_rows(const Segment& s) { return s.epilogue == SWIGLU ? 8 : 16; }
DEVICE int tiles_of(const Segment& s) { return (s.n + tile_rows(s) - 1) >> (s.epilogue == SWIGLU ? 3 : 4); }

// What a warp that finishes a tile needs.
struct Prepared {
    float* out;
    int n, epilogue, out_stride, ring_mask;  // of the segment; n: 0 without a tile
    int first;  // row of the weight
    float factor, factor_up;
    int position;
    float residual[MAX_ROWS / 2];
};

struct LinearWork {
    static constexpr bool EARLY = true;
    const LinearArguments& a;
    Tile tile;
    int complete;              // tiles before this are of `tile`'s segment and have all their rows
    int64_t step, scale_step;  // from a tile of the block to its next

    DEVICE void choose() {}
    DEVICE int tiles() const {
        int tiles = 0;
        for (int i = 0; i < a.segments.count; i++) tiles += tiles_of(a.segments.segment[i]);
        return tiles;
    }
    DEVICE int format_at(int index, int& until) const {
        int i = 0;
        until = tiles_of(a.segments.segment[0]);
        while (index >= until) until += tiles_of(a.segments.segment[++i]);
        return a.segments.segment[i].format;
    }
    DEVICE void point(int index) {
        int i = 0, from = 0;
        while (index - from >= tiles_of(a.segments.segment[i])) from += tiles_of(a.segments.segment[i++]);
        const Segment& s = a.segments.segment[i];
        bool pair = s.epilogue == SWIGLU;
        int k = a.input.k, rows = tile_rows(s);
        tile = make_tile(s.weight, s.scale, pair ? s.weight_up : 0, s.scale_up, (index - from) * rows, s.n, k, s.format);
        complete = from + (s.n >> (pair ? 3 : 4));
        step = (int64_t)gridDim.x * rows * bytes_of(k, s.format), scale_step = (int64_t)gridDim.x * rows * (k / 16);
    }
    DEVICE void advance(int index) {
        if (index < complete) tile.low += step, tile.high += step, tile.scale_low += scale_step, tile.scale_high += scale_step;
        else point(index);
    }

    DEVICE Prepared prepare(int index) const {
        Prepared p = {};
        int i = 0;
        while (i < a.segments.count && index >= tiles_of(a.segments.segment[i])) index -= tiles_of(a.segments.segment[i++]);
        if (i == a.segments.count) return p;
        const Segment& s = a.segments.segment[i];
        p.out = (float*)s.out, p.n = s.n, p.epilogue = s.epilogue, p.out_stride = s.out_stride, p.ring_mask = s.ring_mask;
        p.first = index * tile_rows(s);
        p.factor = factor_of(s.format, s.scale_2);
        if (s.epilogue == SWIGLU) p.factor_up = factor_of(s.format, s.scale_2_up);
        return p;
    }
    DEVICE void ask(Prepared& p) const {
        if (p.ring_mask) p.position = __ldcg(a.input.position);
        if (p.epilogue != ADD) return;
        int lane = threadIdx.x & 31, from = a.residual_row ? __ldcg(a.residual_row) : 0, n = p.first + (lane & 15);
#pragma unroll
        for (int i = 0; i < MAX_ROWS / 2; i++) {
            int row = 2 * i + (lane >> 4);
            if (row < a.input.rows && n < p.n) p.residual[i] = __ldcg(a.residual + (int64_t)(from + row) * p.out_stride + n);
        }
    }
    DEVICE void store(const Prepared& p, int row, int n, float y) const {
        int slot = p.ring_mask ? (p.position + row) & p.ring_mask : row;
        p.out[(int64_t)slot * p.out_stride + n] = y;
    }
    DEVICE void finish(const Prepared& p, const Staged& staged, const Partial& partial, int place) const {
        int lane = threadIdx.x & 31, rows = a.input.rows;
        if (p.epilogue == SWIGLU) {
            for (int row = lane >> 3, j = lane & 7; row < rows && p.first + j < p.n; row += 4) {
                float rms = rms_factor(staged, a.input, row);
                float gate = partial.get(place, row, j) * (rms * p.factor);
                float up = partial.get(place, row, j + 8) * (rms * p.factor_up);
                store(p, row, p.first + j, silu(gate) * up);
            }
            return;
        }
        int j = lane & 15;
#pragma unroll
        for (int i = 0; i < MAX_ROWS / 2; i++) {
            int row = 2 * i + (lane >> 4);
            if (row >= rows || p.first + j >= p.n) break;
            float y = partial.get(place, row, j) * (rms_factor(staged, a.input, row) * p.factor);
            store(p, row, p.first + j, y + p.residual[i]);
        }
    }
    DEVICE void turned(bool first, const Staged& staged) const {
        if (!a.normed || blockIdx.x || !first) return;
        const Input& in = a.input;
        for (int row = 0; row < in.rows; row++) {
            float rms = rms_factor(staged, in, row);
            for (int k = threadIdx.x; k < in.k; k += THREADS)
                a.normed[row * in.k + k] = __ldcg(in.x + (int64_t)row * in.x_stride + k) * (1.f + in.norm_weight[k]) * rms;
        }
    }
};

template <int SETS>
DEVICE void linear_rows(const LinearArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Staged staged;
    LinearWork work = {a};
    go_through_tiles<SETS>(a.input, shared_memory, staged, work);
}
KERNEL __launch_bounds__(THREADS, RESIDENT) linear_4(const __grid_constant__ LinearArguments a) { linear_rows<1>(a); }
KERNEL __launch_bounds__(THREADS, RESIDENT) linear_8(const __grid_constant__ LinearArguments a) { linear_rows<2>(a); }

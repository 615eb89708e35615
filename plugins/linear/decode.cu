// Linear layers on 1..8 rows: several weight matrices of any format over one input, norms fused in front, residual or
// SwiGLU behind. Replaces FloatLinear, Fp8Linear, Nvfp4Linear and ZeroCenteredRmsNorm of plugins/ in a decoding step.
//
// A block's tiles (16 weight rows) are all of one format: a Part of the launch. The first weights are on their way
// before the previous kernel has ended.
#include "linear/stage.cuh"
#include "sampling/best.cuh"

// The segments of one format, and the blocks that share their tiles.
struct Part {
    int format;
    int first_segment, end_segment;
    int first_block, blocks;
    int tiles;
    int depth;  // passes that a warp has under way
};
constexpr int MAX_PARTS = 3;

struct LinearArguments {
    Segments segments;        // sorted by format
    Part parts[MAX_PARTS];
    Input input;
    const float* residual;    // ADD: out = residual + product, row (t + *residual_row)
    const int* residual_row;  // null: 0
    float* normed;            // null, or the staged input in float32, [T, K]: the norm's output
    Ahead ahead;
};

DEVICE int tile_rows(const Segment& s) { return s.epilogue == SWIGLU ? 8 : 16; }
DEVICE int tiles_of(const Segment& s) { return (s.n + tile_rows(s) - 1) >> (s.epilogue == SWIGLU ? 3 : 4); }

// What a warp that finishes a tile needs.
template <int SETS>
struct PreparedTile {
    int segment, first;  // row of the weight
    float scale_2, scale_2_up;
    int position;
    float residual[2 * SETS];
};

// Where the rows' largest logits go, of a launch that is an lm_head.
struct BestArguments {
    uint8_t* scratch;  // as sampling's: a Row and a list of `vocab` for each row
    int* error;
    Tokens tokens;
    int vocab;
    int padding;
};

// best: of each set's row so far, of an lm_head (BEST).
template <int SETS, bool BEST>
struct LinearWork {
    using Prepared = PreparedTile<SETS>;
    const LinearArguments& a;
    const Part& part;
    Best* best;

    // A tile's segment; `index` becomes its place there.
    DEVICE int segment_of(int& index) const {
        int i = part.first_segment;
#pragma unroll 1
        while (i + 1 < part.end_segment && index >= tiles_of(a.segments.segment[i]))
            index -= tiles_of(a.segments.segment[i++]);
        return i;
    }
    struct Place {
        int index;        // in its segment
        int segment;      // from the part's first one
        int whole;        // tiles of the segment, but for one that is not full
        int stride, scale_stride;  // bytes from a tile to the next one of the block
    };
    DEVICE int apart() const { return BEST ? 1 : part.blocks; }  // tiles

    DEVICE Place place(int index) const { return {index}; }
    DEVICE void open(Place& p, Tile& tile) const {
#pragma unroll 1
        while (part.first_segment + p.segment + 1 < part.end_segment) {
            int tiles = tiles_of(a.segments.segment[part.first_segment + p.segment]);
            if (p.index < tiles) break;
            p.index -= tiles, p.segment++;
        }
        const Segment& s = a.segments.segment[part.first_segment + p.segment];
        bool pair = s.epilogue == SWIGLU;
        int rows = apart() * tile_rows(s);
        p.whole = s.n / tile_rows(s);
        p.stride = rows * bytes_of(a.input.k, part.format), p.scale_stride = rows * (a.input.k >> 4);
        uint32_t first = p.index * tile_rows(s), last = s.n - 1;
        Run low = {s.weight, s.scale, first, last};
        Run high = {pair ? s.weight_up : s.weight, pair ? s.scale_up : s.scale, pair ? first : first + 8, last};
        tile = make_tile(low, high, a.input.k, part.format);
    }
    DEVICE void advance(Place& p, Tile& tile, bool any) const {
        p.index += apart();
        tile.low += p.stride, tile.high += p.stride, tile.scale += p.scale_stride;
        if (any && p.index >= p.whole) open(p, tile);
    }
    DEVICE Prepared prepare(int index) const {
        Prepared p = {};
        p.segment = segment_of(index);
        const Segment& s = a.segments.segment[p.segment];
        p.first = index * tile_rows(s);
        if (part.format != BF16) {
            p.scale_2 = *s.scale_2;
            if (s.epilogue == SWIGLU) p.scale_2_up = *s.scale_2_up;
        }
        if (s.ring_mask) p.position = __ldcg(a.input.position);
        if (s.epilogue != ADD) return p;
        int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3, from = a.residual_row ? __ldcg(a.residual_row) : 0;
#pragma unroll
        for (int i = 0; i < 2 * SETS; i++) {
            int row = i / 2 * SET_ROWS + t, n = p.first + g + i % 2 * 8;
            if (row < a.input.rows && n < s.n)
                p.residual[i] = __ldcg(a.residual + (int64_t)(from + row) * s.out_stride + n);
        }
        return p;
    }
    DEVICE void finish(const Prepared& p, const Staged& staged, const float (&value)[2 * SETS]) const {
        const Segment& s = a.segments.segment[p.segment];
        int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
        float factor = factor_of(p.scale_2, part.format), factor_up = factor_of(p.scale_2_up, part.format);
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            int row = set * SET_ROWS + t, n = p.first + g;
            if (row >= a.input.rows) break;
            float rms = rms_factor(staged, a.input, row), low = value[2 * set], high = value[2 * set + 1];
            int slot = s.ring_mask ? (p.position + row) & s.ring_mask : row;
            float* out = (float*)s.out + (int64_t)slot * s.out_stride + n;
            if (s.epilogue == SWIGLU) {
                if (n < s.n) *out = silu(low * (rms * factor)) * (high * (rms * factor_up));
            } else {
                float first = low * (rms * factor) + p.residual[2 * set];
                float second = high * (rms * factor) + p.residual[2 * set + 1];
                if (n < s.n) *out = first;
                if (n + 8 < s.n) out[8] = second;
                if (BEST && n < s.n) best[set].offer(rank_of(first, first), n);
                if (BEST && n + 8 < s.n) best[set].offer(rank_of(second, second), n + 8);
            }
        }
    }
};

// Joins the warps' and the blocks' best entries; the last block hands out the tokens.
template <int SETS>
DEVICE void join_best(const BestArguments& b, const Best (&best)[SETS], int rows) {
    __shared__ Wide partial[WARPS][MAX_ROWS];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = threadIdx.x;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        Wide packed = best[set].packed();
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) packed = max(packed, __shfl_xor_sync(ALL_LANES, packed, offset));
        if (lane < SET_ROWS) partial[warp][set * SET_ROWS + lane] = packed;
    }
    __syncthreads();
    if (row < rows) {
        Wide packed = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) packed = max(packed, partial[w][row]);
        if (packed) atomicMax(&row_at(b.scratch, b.vocab, row).best, packed);
    }
    bool last = is_last_block(row_at(b.scratch, b.vocab, 0));  // counted at one row for all
    if (last && threadIdx.x == 0) row_at(b.scratch, b.vocab, 0).claimed = 0;
    if (last && row < rows) write_token(row_at(b.scratch, b.vocab, row), b.tokens, b.error, row);
}

template <int SETS, bool BEST>
DEVICE void linear_rows(const LinearArguments& a, const BestArguments* b) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Staged staged;
    __shared__ int base[2];
    const Input& in = a.input;
    mark_start(a.segments.segment[0].n << 4 | a.segments.count, in.rows);
    if (!in.late) launch_next();
    int i = 0;
#pragma unroll 1
    while (i < MAX_PARTS && blockIdx.x >= a.parts[i].first_block + a.parts[i].blocks) i++;
    if (i == MAX_PARTS) {  // a block that only takes its room
        wait_for_previous();
        if (in.late) launch_next();
        return;
    }
    const Part& part = a.parts[i];
    Best best[SETS];
    using Work = LinearWork<SETS, BEST>;
    const Work work = {a, part, best};
    uint8_t* vectors = (uint8_t*)shared_memory + in.pool;
    float* exchange = (float*)(vectors + 2 * in.rows * vector_bytes(in.k));
    int block = blockIdx.x - part.first_block;
    const Claims claims = {BEST ? &row_at(b->scratch, b->vocab, 0).claimed : nullptr, base};
    Stream<Work, BEST> stream(work, in, part.format, part.depth, BEST ? block * CLAIM : block, work.apart(), claims,
                              shared_memory);
    stream.start(part.tiles, part.format);
    NormWeight weight;
    weight.load(in, share_of(in.k, threadIdx.x / 32));
    fetch_ahead(a.ahead);
    mark(ASKED);
    wait_for_previous();
    mark(WAITED);
    if (in.late) launch_next();
    stage(vectors, staged, in, weight, part.format);
    mark(STAGED);
    multiply_tiles<SETS>(in, stream, work, part.format, vectors, staged, exchange);
    if (BEST) join_best(*b, best, in.rows);
    mark(ENDED);
    if (!a.normed || blockIdx.x) return;
    for (int row = 0; row < in.rows; row++) {
        float rms = rms_factor(staged, in, row);
        for (int k = threadIdx.x; k < in.k; k += THREADS)
            a.normed[row * in.k + k] = __ldcg(in.x + (int64_t)row * in.x_stride + k) * (1.f + in.norm_weight[k]) * rms;
    }
}
#define LINEAR(ROWS, SETS)                                                                                           \
    KERNEL __launch_bounds__(THREADS, RESIDENT) linear_##ROWS(const __grid_constant__ LinearArguments a) {            \
        linear_rows<SETS, false>(a, nullptr);                                                                         \
    }                                                                                                                 \
    KERNEL __launch_bounds__(THREADS, RESIDENT)                                                                       \
        linear_best_##ROWS(const __grid_constant__ LinearArguments a, const __grid_constant__ BestArguments b) {      \
        linear_rows<SETS, true>(a, &b);                                                                               \
    }
LINEAR(4, 1)
LINEAR(8, 2)

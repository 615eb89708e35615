// The routed experts and the shared one on 1..8 rows, chosen by plugins/moe_routing/routing.cuh. Ops: MoeRouting,
// Nvfp4MoeExperts, FloatMoeExperts, with the norm in front and the residual behind.
//
// An expert that several rows want is read once. experts_up writes silu(gate) * up; experts_down adds a row's experts
// in the order of its routing, whatever the other rows are.
#include "linear/stage.cuh"
#include "moe_routing/routing.cuh"

struct UpArguments {
    Input input;
    const float* router_logits;  // [T, NUM_EXPERTS]
    const uint8_t* weight;  // [E, 2 I, H]: gate rows, then up rows
    const uint8_t* scale;   // NVFP4: E4M3 [E, 2 I, H / 16]
    const float* scale_2;   // NVFP4: [E, 2]
    float* act;             // [T, TOP_K, I]
    int format;
    int inner;  // a multiple of eight
    int depth;  // passes that a warp has under way
    int padding;
    Ahead ahead;
};

struct PreparedAct {
    int item, first;
    float scale_2, scale_2_up;
};
struct ActPlace {
    int item, index;  // index: of a tile of the item
};

template <int SETS>
struct UpWork {
    using Prepared = PreparedAct;
    const UpArguments& a;
    const Chosen& chosen;

    DEVICE int tiles_of_item() const { return a.inner >> 3; }
    DEVICE ActPlace act_place(int index) const {
        int tiles = tiles_of_item(), item = index / tiles;
        return {item, index - item * tiles};
    }
    struct Place {
        ActPlace at, step;       // step: to the next one of the block
        Tile first;              // of expert 0
        uint32_t bytes, scales;  // of a row
    };
    DEVICE Place place(int index) const {
        return {act_place(index), act_place(gridDim.x),
                make_whole_tile(a.weight, a.scale, 0, a.inner, a.input.k, a.format),
                (uint32_t)bytes_of(a.input.k, a.format), (uint32_t)a.input.k >> 4};
    }
    DEVICE void open(const Place& p, Tile& tile) const {
        uint32_t row = chosen.expert[min(p.at.item, MAX_ITEMS - 1)] * 2 * a.inner + p.at.index * 8;
        uint64_t offset = (uint64_t)row * p.bytes;
        tile = p.first;
        tile.low += offset, tile.high += offset, tile.scale += (uint64_t)row * p.scales;
    }
    DEVICE void advance(Place& p, Tile& tile, bool) const {
        int tiles = tiles_of_item();
        p.at.item += p.step.item, p.at.index += p.step.index;
        bool over = p.at.index >= tiles;
        p.at.item += over, p.at.index -= over ? tiles : 0;
        open(p, tile);
    }
    DEVICE Prepared prepare(int index) const {
        ActPlace at = act_place(index);
        Prepared p = {at.item, at.index * 8, 0.f, 0.f};
        const float* scale_2 = a.scale_2 + 2 * chosen.expert[at.item];
        if (a.format == NVFP4) p.scale_2 = scale_2[0], p.scale_2_up = scale_2[1];
        return p;
    }
    DEVICE void finish(const Prepared& p, const Staged& staged, const float (&value)[2 * SETS]) const {
        int n = p.first + ((threadIdx.x & 31) >> 2);
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            int row = set * SET_ROWS + (threadIdx.x & 3);
            if (row >= a.input.rows) break;
            int slot = chosen.slot[p.item][row];
            if (slot < 0) continue;
            float rms = rms_factor(staged, a.input, row);
            float gate = value[2 * set] * (rms * factor_of(p.scale_2, a.format));
            float up = value[2 * set + 1] * (rms * factor_of(p.scale_2_up, a.format));
            a.act[(int64_t)(row * TOP_K + slot) * a.inner + n] = silu(gate) * up;
        }
    }
};

// experts_down may start as soon as it can choose its experts, after the router. It then takes time from experts_up's own
// choice, which is worth it where experts_up has so few rows that it would be done before experts_down is ready.
constexpr int EARLY_ROWS = 1;

template <int SETS>
DEVICE void up_rows(const UpArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Staged staged;
    __shared__ Chosen chosen;
    const Input& in = a.input;
    const UpWork<SETS> work = {a, chosen};
    uint8_t* vectors = (uint8_t*)shared_memory + in.pool;
    float* exchange = (float*)(vectors + 2 * in.rows * vector_bytes(in.k));
    mark_start(1, in.rows);
    fetch_ahead(a.ahead);
    int warp = threadIdx.x >> 5;
    NormWeight weight;
    weight.load(in, share_of(in.k, warp));
    Stream<UpWork<SETS>, false> stream(work, in, a.format, a.depth, blockIdx.x, gridDim.x, Claims(), shared_memory);
    stage(vectors, staged, in, weight, a.format);  // while the router works, see common.cuh
    mark(STAGED);
    wait_for_previous();
    mark(WAITED);
    if (in.rows <= EARLY_ROWS) launch_next();
    Keys keys;
    if (warp < in.rows) keys.load(a.router_logits + warp * NUM_EXPERTS);
    choose_experts(chosen, keys, in.rows);
    mark(CHOSEN);
    if (in.rows > EARLY_ROWS) launch_next();
    int tiles = chosen.count * work.tiles_of_item();
    stream.start(tiles, a.format);
    mark(ASKED);
    multiply_tiles<SETS>(in, stream, work, a.format, vectors, staged, exchange);
    mark(ENDED);
}
KERNEL __launch_bounds__(THREADS, RESIDENT) experts_up_4(const __grid_constant__ UpArguments a) { up_rows<1>(a); }
KERNEL __launch_bounds__(THREADS, RESIDENT) experts_up_8(const __grid_constant__ UpArguments a) { up_rows<2>(a); }

struct DownArguments {
    const float* router_logits;  // [T, NUM_EXPERTS]
    const uint8_t* weight;         // [E, H, I]
    const uint8_t* scale;          // NVFP4: [E, H, I / 16]
    const float* scale_2;          // NVFP4: [E]
    const float* act;              // [T, TOP_K, I]
    Segment shared;                // the shared expert's down projection: weight, scale, scale_2, format
    const float* shared_act;       // [T, Is]
    const float* shared_gate;      // [T]: its logit
    float* x;                      // [T, H]: x += experts
    int format;
    int inner;
    int shared_inner;
    int hidden;                    // a multiple of 16
    int rows;
    int depth;                     // passes that a warp has under way
};

constexpr int DOWN_WARPS = 8;

// What the rows' experts made, staged: of each pair of a row and an expert, then of the rows' shared expert.
struct Acts {
    const DownArguments& a;
    uint8_t* vectors;
    float* unscale;
    int pairs, stride, shared_stride;

    // As stage's Turn: 512 values of a pair from `from` on.
    struct Turn {
        int pair, from, scan;
    };
    DEVICE void load(float (&v)[2][8], const Turn& turn, bool routed, int k) const {
        const float* x = (routed ? a.act : a.shared_act - (int64_t)pairs * k) + (int64_t)turn.pair * k;
#pragma unroll
        for (int h = 0; h < 2; h++)
            load_eight(v[h], x + min(turn.from + h * PIECE + (int)(threadIdx.x & 31) * 8, k - 8));
    }
    DEVICE void stage(const Turn& turn, float (&v)[2][8], uint32_t& largest, bool routed, int k) const {
        int lane = threadIdx.x & 31, format = routed ? a.format : a.shared.format, from = turn.from;
        if (from + 2 * PIECE > k) {
#pragma unroll
            for (int j = 0; j < 16; j++)
                if (from + j / 8 * PIECE + lane * 8 >= k) v[j / 8][j % 8] = 0.f;
        }
        float most = 0.f;
#pragma unroll
        for (int j = 0; j < 16; j++) most = fmaxf(most, fabsf(v[j / 8][j % 8]));
        largest = max(largest, __reduce_max_sync(ALL_LANES, __float_as_uint(most)));
        if (turn.scan == 1) return;
        uint8_t* vector = vectors + (routed ? turn.pair * stride : pairs * stride + (turn.pair - pairs) * shared_stride);
        float scale = scale_of(largest, format);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int at = from + h * PIECE + lane * 8;
            if (at < k) split_eight(vector + chunk_place(at / 8), vector_bytes(k), v[h], scale, format);
        }
        if (lane == 0) unscale[turn.pair] = unscale_of(largest, format);
    }

    // The warp's share, every eighth, of the pairs, or of the rows' shared expert, for which the last warps begin: the first
    // choose the rows' experts.
    DEVICE void stage_all(bool routed) const {
        int end = routed ? pairs : pairs + a.rows, k = routed ? a.inner : a.shared_inner;
        int scan = k > 2 * PIECE ? 1 : 0, warp = threadIdx.x >> 5;
        Turn turn = {routed ? warp : pairs + DOWN_WARPS - 1 - warp, 0, scan};
        float v[2][8], following[2][8];
        uint32_t largest = 0;
        if (turn.pair < end) load(v, turn, routed, k);
#pragma unroll 1
        while (turn.pair < end) {
            Turn next = {turn.pair, turn.from + 2 * PIECE, turn.scan};
            if (next.from >= k) {
                next.from = 0, next.scan = turn.scan == 1 ? 2 : scan;
                if (turn.scan != 1) next.pair += DOWN_WARPS;
            }
            if (next.pair < end) load(following, next, routed, k);
            stage(turn, v, largest, routed, k);
            if (next.pair != turn.pair) largest = 0;
            turn = next;
#pragma unroll
            for (int i = 0; i < 16; i++) v[i / 8][i % 8] = following[i / 8][i % 8];
        }
    }
};

// One block per 16 rows of the down projections. The shared expert's k is shared by the warps, as in linear layers, all of
// it before the wait: experts_up is a late kernel. Then a warp takes every eighth routed expert.
template <int SETS>
DEVICE void down_rows(const DownArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Chosen chosen;
    __shared__ float parts[MAX_ROWS * TOP_K][TILE];  // of a pair: a row's expert
    __shared__ float shared_parts[DOWN_WARPS][MAX_ROWS][TILE];
    __shared__ float unscale[MAX_ROWS * (TOP_K + 1)];      // of the pairs, then of the rows of the shared expert
    __shared__ uint8_t pair_for[MAX_ITEMS][MAX_ROWS];  // a row's pair with an expert; for others another row's
    mark_start(2, a.rows);
    launch_next();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, first = blockIdx.x * TILE;
    int pairs = a.rows * TOP_K, stride = 2 * vector_bytes(a.inner), shared_stride = 2 * vector_bytes(a.shared_inner);
    const int depth = a.depth;
    Slot* slots = (Slot*)shared_memory + warp * depth;
    uint8_t* vectors = (uint8_t*)((Slot*)shared_memory + DOWN_WARPS * depth);
    const Acts acts = {a, vectors, unscale, pairs, stride, shared_stride};

    // Passes on their way: the warp's of the shared expert, then its experts'. next: the last one asked for.
    const uint64_t policy = evict_first();
    int shared_end = bytes_of(a.shared_inner, a.shared.format), end = bytes_of(a.inner, a.format);
    uint32_t scales = a.inner >> 4;
    Tile next = make_whole_tile(a.shared.weight, a.shared.scale, first, 8, a.shared_inner, a.shared.format);
    const Tile zeroth = make_whole_tile(a.weight, a.scale, first, 8, a.inner, a.format);  // of expert 0
    int shared_warp = DOWN_WARPS - 1 - warp;  // the first warps have the rows' choices to make
    int next_item = -1, next_at = (shared_warp - DOWN_WARPS) * PASS, next_step = DOWN_WARPS * PASS, next_end = shared_end;
    int next_format = a.shared.format, items = 0, filled = 0;
    auto advance = [&] {
        if (next_item >= items) return;
        next_at += next_step;
        if (next_at < next_end) return;
        next_item = next_item < 0 ? warp : next_item + DOWN_WARPS;
        next_at = 0, next_step = PASS, next_end = end, next_format = a.format;
        uint32_t row = chosen.expert[min(next_item, MAX_ITEMS - 1)] * a.hidden;
        uint64_t offset = (uint64_t)row * (uint32_t)end;
        next = {zeroth.low + offset, zeroth.high + offset, zeroth.low_4, zeroth.high_4,
                zeroth.scale + (uint64_t)row * scales};
    };
    auto put = [&](int slot) {
        if (next_item < items) fetch(slots[slot], next, next_at, next_end, next_format, policy);
        copy_commit();
    };
#pragma unroll 1
    for (; filled < depth && next_at + next_step < shared_end; filled++) next_at += next_step, put(filled);
    Keys keys;
    if (warp < a.rows) keys.load(a.router_logits + warp * NUM_EXPERTS);  // before experts_up, see common.cuh
    int tile_row = threadIdx.x % TILE, row = threadIdx.x / TILE, n = first + tile_row;
    float gate = 0.f, residual = 0.f, shared_scale = 1.f;
    if (a.shared.format != BF16) shared_scale = *a.shared.scale_2;
    auto scale_2_of = [&](int item) {
        return item >= items || a.format == BF16 ? 1.f : a.scale_2[chosen.expert[item]];
    };
    auto pair_of = [&](int item, int row) {  // or -1
        if (row >= a.rows || chosen.slot[item][row] < 0) return -1;
        return row * TOP_K + chosen.slot[item][row];
    };
    Sums<SETS> sums;
    int slot = 0, columns[SETS];
    float scale_2 = 1.f;
#pragma unroll 1
    for (int routed = 0; routed < 2; routed++) {  // the shared expert first: its code, the same, is then at hand
        if (routed) wait_for_previous(), mark(WAITED);
        acts.stage_all(routed);
        if (!routed) {
            choose_experts(chosen, keys, a.rows);
            mark(CHOSEN);
            items = chosen.count;
#pragma unroll 1
            for (; filled < depth; filled++) advance(), put(filled);
            mark(ASKED);
            scale_2 = scale_2_of(warp);
            if (warp < a.rows) keys.weigh(chosen.weight[warp]);
            for (int i = (threadIdx.x + 32 * DOWN_WARPS / 2) % (32 * DOWN_WARPS); i < items * MAX_ROWS; i += 32 * DOWN_WARPS) {
                int item = i / MAX_ROWS, pair = pair_of(item, i % MAX_ROWS);
                for (int row = 0; pair < 0; row++) pair = pair_of(item, row);
                pair_for[item][i % MAX_ROWS] = pair;
            }
        } else {
            mark(STAGED);
            if (row < a.rows) gate = __ldcg(a.shared_gate + row), residual = __ldcg(a.x + (int64_t)row * a.hidden + n);
            __syncthreads();
        }
        int from = routed ? 0 : shared_warp * PASS, stop = routed ? end : shared_end, step = routed ? PASS : DOWN_WARPS * PASS;
        int format = routed ? a.format : a.shared.format, last = routed ? items : 1;
#pragma unroll 1
        for (int item = routed ? warp : 0; item < last; item += DOWN_WARPS) {
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                int of = s * SET_ROWS + (g >> 1), low = routed ? stride : shared_stride;
                int vector = routed ? pair_for[item][of] : of < a.rows ? of : 0;
                columns[s] = (routed ? 0 : pairs * stride) + vector * low + (g & 1) * low / 2;
            }
            sums.clear();
            with_format(format, [&](auto constant) {
#pragma unroll 1
                for (int at = from; at < stop; at += step) {
                    wait_for_pass(depth);
                    advance();
                    multiply_pass<SETS, constant.value>(sums, slots[slot], at, 0, stop, vectors, columns);
                    __syncwarp();
                    put(slot);
                    slot = slot + 1 == depth ? 0 : slot + 1;
                }
            });
            float factor = factor_of(routed ? scale_2 : shared_scale, format);
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                int of = s * SET_ROWS + t, pair = routed ? pair_of(item, of) : of < a.rows ? pairs + of : -1;
                if (pair < 0) continue;
                float* out = routed ? parts[pair] : shared_parts[shared_warp][of];
                out[g] = sums.total(s, 0) * (unscale[pair] * factor), out[g + 8] = sums.total(s, 1) * (unscale[pair] * factor);
            }
            if (routed) scale_2 = scale_2_of(item + DOWN_WARPS);
        }
    }
    mark(MULTIPLIED);
    __syncthreads();
    if (row >= a.rows) return;
    float v[DOWN_WARPS];
#pragma unroll
    for (int w = 0; w < DOWN_WARPS; w++) v[w] = shared_parts[w][row][tile_row];
    float y = sigmoid(gate) * (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
#pragma unroll
    for (int j = 0; j < TOP_K; j++) y += chosen.weight[row][j] * parts[row * TOP_K + j][tile_row];
    a.x[(int64_t)row * a.hidden + n] = residual + y;
    mark(ENDED);
}
KERNEL __launch_bounds__(32 * DOWN_WARPS, 2) experts_down_4(const __grid_constant__ DownArguments a) { down_rows<1>(a); }
KERNEL __launch_bounds__(32 * DOWN_WARPS, 2) experts_down_8(const __grid_constant__ DownArguments a) { down_rows<2>(a); }

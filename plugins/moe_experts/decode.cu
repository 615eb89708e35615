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
    int inner;
    int depth;  // passes that a warp has under way
    int padding;
};

struct PreparedAct {
    int item, first;
    float scale_2, scale_2_up;
};

template <int SETS>
struct UpWork {
    using Prepared = PreparedAct;
    const UpArguments& a;
    const Chosen& chosen;

    DEVICE int tiles_of_item() const { return (a.inner + 7) >> 3; }
    struct Place {
        int index, item;            // index: of its item
        int index_step, item_step;  // to the next one of the block
    };
    DEVICE Place place(int index) const {
        int tiles = tiles_of_item(), items = index / tiles, grid_items = gridDim.x / tiles;
        return {index - items * tiles, items, (int)gridDim.x - grid_items * tiles, grid_items};
    }
    DEVICE void open(const Place& p, Tile& tile) const {
        if (a.inner % 8 == 0) {
            uint32_t row = chosen.expert[p.item] * 2 * a.inner + p.index * 8;
            tile = make_whole_tile(a.weight, a.scale, row, a.inner, a.input.k, a.format);
            return;
        }
        uint32_t gate = chosen.expert[p.item] * 2 * a.inner, up = gate + a.inner, row = p.index * 8;
        tile = make_tile({a.weight, a.scale, gate + row, gate + a.inner - 1},
                         {a.weight, a.scale, up + row, up + a.inner - 1}, a.input.k, a.format);
    }
    DEVICE void advance(Place& p, Tile& tile) const {
        p.index += p.index_step, p.item += p.item_step;
        if (p.index >= tiles_of_item()) p.index -= tiles_of_item(), p.item++;
        open(p, tile);
    }
    DEVICE Prepared prepare(int index) const {
        int item = 0, tiles = tiles_of_item();
#pragma unroll 1
        while (index >= tiles) index -= tiles, item++;
        Prepared p = {item, index * 8, 0.f, 0.f};
        const float* scale_2 = a.scale_2 + 2 * chosen.expert[item];
        if (a.format == NVFP4) p.scale_2 = scale_2[0], p.scale_2_up = scale_2[1];
        return p;
    }
    DEVICE void ask(Prepared&) const {}
    DEVICE void finish(const Prepared& p, const Staged& staged, const float (&value)[2 * SETS]) const {
        int n = p.first + ((threadIdx.x & 31) >> 2);
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            int row = set * SET_ROWS + (threadIdx.x & 3);
            if (row >= a.input.rows) break;
            int slot = chosen.slot[p.item][row];
            if (slot < 0 || n >= a.inner) continue;
            float rms = rms_factor(staged, a.input, row);
            float gate = value[2 * set] * (rms * factor_of(p.scale_2, a.format));
            float up = value[2 * set + 1] * (rms * factor_of(p.scale_2_up, a.format));
            a.act[(int64_t)(row * TOP_K + slot) * a.inner + n] = silu(gate) * up;
        }
    }
};

template <int SETS>
DEVICE void up_rows(const UpArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Staged staged;
    __shared__ Chosen chosen;
    const Input& in = a.input;
    const UpWork<SETS> work = {a, chosen};
    uint8_t* vectors = (uint8_t*)shared_memory + in.pool;
    float* exchange = (float*)(vectors + 2 * in.rows * vector_bytes(in.k));
    int warp = threadIdx.x >> 5, own = blockIdx.x + warp * gridDim.x;
    NormWeight weight;
    weight.load(in, share_of(in.k, warp));
    Stream<UpWork<SETS>> stream(work, in, a.format, a.depth, blockIdx.x, gridDim.x, shared_memory);
    stage(vectors, staged, in, weight, a.format);  // while the router works, see common.cuh
    wait_for_previous();
    launch_next();  // not before: experts_down reads the router's logits at once
    Keys keys;
    if (warp < in.rows) keys.load(a.router_logits + warp * NUM_EXPERTS);
    choose_experts(chosen, keys, in.rows, false);
    int tiles = chosen.count * work.tiles_of_item();
    stream.start(tiles);
    PreparedAct prepared = {};
    if (own < tiles) prepared = work.prepare(own);
    multiply_tiles<SETS>(in, stream, work, prepared, vectors, staged, exchange);
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
    int hidden;
    int rows;
    int slots;                     // passes under way, of all warps
};

constexpr int DOWN_WARPS = 12;
constexpr int AT_ONCE = 2;  // vectors that a warp stages together

// What the rows' experts made, staged. As stage_pieces: N vectors together, 512 values of each from `from` on.
struct Acts {
    const DownArguments& a;
    uint8_t* vectors;
    float* unscale;
    int pairs, stride, shared_stride;

    DEVICE int length(int pair) const { return pair < pairs ? a.inner : a.shared_inner; }

    template <int N>
    DEVICE void stage(int first, uint32_t (&largest)[N], int from = 0, int scan = 0) const {
        int lane = threadIdx.x & 31, k[N], pair[N];
        float v[N][2][8];
#pragma unroll
        for (int i = 0; i < N; i++) {
            pair[i] = min(first + i * DOWN_WARPS, pairs + a.rows - 1), k[i] = length(pair[i]);
            bool routed = pair[i] < pairs;
            const float* x = (routed ? a.act : a.shared_act) + (int64_t)(routed ? pair[i] : pair[i] - pairs) * k[i];
#pragma unroll
            for (int h = 0; h < 2; h++) load_eight(v[i][h], x + min(from + h * PIECE + lane * 8, k[i] - 8));
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (from + 2 * PIECE > k[i]) {
#pragma unroll
                for (int j = 0; j < 16; j++)
                    if (from + j / 8 * PIECE + lane * 8 >= k[i]) v[i][j / 8][j % 8] = 0.f;
            }
            float most = 0.f;
#pragma unroll
            for (int j = 0; j < 16; j++) most = fmaxf(most, fabsf(v[i][j / 8][j % 8]));
            largest[i] = max(largest[i], __reduce_max_sync(ALL_LANES, __float_as_uint(most)));
        }
        if (scan == 1) return;
#pragma unroll
        for (int i = 0; i < N; i++) {
            bool routed = pair[i] < pairs;
            int format = routed ? a.format : a.shared.format;
            uint8_t* vector = vectors + (routed ? pair[i] * stride : pairs * stride + (pair[i] - pairs) * shared_stride);
            float scale = scale_of(largest[i], format);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int at = from + h * PIECE + lane * 8;
                if (at < k[i]) split_eight(vector + chunk_place(at / 8), vector_bytes(k[i]), v[i][h], scale, format);
            }
            if (lane == 0) unscale[pair[i]] = unscale_of(largest[i], format);
        }
    }
};

// One block per 16 rows of the down projections; its warps take an expert each. Item 0 is the shared expert.
template <int SETS>
DEVICE void down_rows(const DownArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Chosen chosen;
    __shared__ float parts[MAX_ROWS * (TOP_K + 1)][TILE];  // [pair, tile row]; a pair: a row's place, or shared expert
    __shared__ float unscale[MAX_ROWS * (TOP_K + 1)];
    __shared__ uint8_t pair_for[MAX_ITEMS + 1][MAX_ROWS];  // a row's pair in an item; for others another row's
    launch_next();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, first = blockIdx.x * TILE;
    int pairs = a.rows * TOP_K, stride = 2 * vector_bytes(a.inner), shared_stride = 2 * vector_bytes(a.shared_inner);
    int depth = a.slots / DOWN_WARPS, more = a.slots % DOWN_WARPS;  // of which the first warps have one more
    Slot* slots = (Slot*)shared_memory + warp * depth + min(warp, more);
    uint8_t* vectors = (uint8_t*)((Slot*)shared_memory + a.slots);
    depth += warp < more;
    auto vector_of = [&](int pair) {
        return pair < pairs ? pair * stride : pairs * stride + (pair - pairs) * shared_stride;
    };
    auto pair_of = [&](int item, int row) {  // or -1
        if (row >= a.rows) return -1;
        int slot = item ? chosen.slot[item - 1][row] : 0;
        return slot < 0 ? -1 : item ? row * TOP_K + slot : pairs + row;
    };

    Keys keys;
    if (warp < a.rows) keys.load(a.router_logits + warp * NUM_EXPERTS);  // before experts_up, see common.cuh
    choose_experts(chosen, keys, a.rows, true);
    int items = 1 + chosen.count;
    auto format_of = [&](int item) { return item ? a.format : a.shared.format; };
    auto end_of = [&](int item) { return bytes_of(item ? a.inner : a.shared_inner, format_of(item)); };
    auto find = [&](int item) {
        uint32_t before = item ? chosen.expert[item - 1] * a.hidden : 0, row = before + first, last = before + a.hidden - 1;
        const uint8_t *weight = item ? a.weight : a.shared.weight, *scale = item ? a.scale : a.shared.scale;
        if (a.hidden % TILE == 0)
            return make_whole_tile(weight, scale, row, 8, item ? a.inner : a.shared_inner, format_of(item));
        return make_tile({weight, scale, row, last}, {weight, scale, row + 8, last}, item ? a.inner : a.shared_inner,
                         format_of(item));
    };
    const uint64_t policy = evict_first();
    int next_item = warp, next_at = 0, next_end = 0, next_format = BF16;
    Tile next;
    auto open = [&] {
        if (next_item < items) next = find(next_item), next_end = end_of(next_item), next_format = format_of(next_item);
        next_at = 0;
    };
    open();
    auto fetch_next = [&](int slot) {
        if (next_item < items) {
            fetch(slots[slot], next, next_at, next_end, next_format, policy);
            next_at += PASS;
            if (next_at >= next_end) next_item += DOWN_WARPS, open();
        }
        copy_commit();
    };
#pragma unroll 1
    for (int slot = 0; slot < depth; slot++) fetch_next(slot);
    auto scale_2_of = [&](int item) {
        if (item >= items || format_of(item) == BF16) return 1.f;
        return item ? a.scale_2[chosen.expert[item - 1]] : *a.shared.scale_2;
    };
    for (int i = threadIdx.x; i < items * MAX_ROWS; i += 32 * DOWN_WARPS) {
        int item = i / MAX_ROWS, pair = pair_of(item, i % MAX_ROWS);
        for (int row = 0; pair < 0; row++) pair = pair_of(item, row);
        pair_for[item][i % MAX_ROWS] = pair;
    }
    float scale_2 = scale_2_of(warp);
    int tile_row = threadIdx.x % TILE, row = threadIdx.x / TILE, n = first + tile_row;
    bool finishing = row < a.rows && n < a.hidden;
    float gate = 0.f, residual = 0.f;
    wait_for_previous();
    if (finishing) gate = __ldcg(a.shared_gate + row), residual = __ldcg(a.x + (int64_t)row * a.hidden + n);
    const Acts acts = {a, vectors, unscale, pairs, stride, shared_stride};
    if (max(a.inner, a.shared_inner) > 2 * PIECE) {
#pragma unroll 1
        for (int pair = warp; pair < pairs + a.rows; pair += DOWN_WARPS) {
            uint32_t largest[1] = {};
#pragma unroll 1
            for (int scan = 1; scan < 3; scan++)
#pragma unroll 1
                for (int from = 0; from < acts.length(pair); from += 2 * PIECE) acts.stage<1>(pair, largest, from, scan);
        }
    } else {
#pragma unroll 1
        for (int pair = warp; pair < pairs + a.rows; pair += AT_ONCE * DOWN_WARPS) {
            uint32_t largest[AT_ONCE] = {};
            if (pair + DOWN_WARPS < pairs + a.rows) acts.stage<AT_ONCE>(pair, largest);
            else acts.stage<1>(pair, (uint32_t(&)[1])largest);
        }
    }
    __syncthreads();

    Sums<SETS> sums;
    int slot = 0;
#pragma unroll 1
    for (int item = warp; item < items; item += DOWN_WARPS) {
        int format = format_of(item), end = end_of(item), columns[SETS];
#pragma unroll
        for (int s = 0; s < SETS; s++)
            columns[s] = vector_of(pair_for[item][s * SET_ROWS + (g >> 1)]) + (g & 1) * (item ? stride : shared_stride) / 2;
        sums.clear();
#pragma unroll 1
        for (int at = 0; at < end; at += PASS) {
            wait_for_pass(depth);
            multiply(sums, slots[slot], format, at, 0, end, vectors, columns);
            __syncwarp();
            fetch_next(slot);
            slot = slot + 1 == depth ? 0 : slot + 1;
        }
        float factor = factor_of(scale_2, format);
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            int pair = pair_of(item, s * SET_ROWS + t);
            if (pair < 0) continue;
            parts[pair][g] = sums.total(s, 0) * (unscale[pair] * factor);
            parts[pair][g + 8] = sums.total(s, 1) * (unscale[pair] * factor);
        }
        scale_2 = scale_2_of(item + DOWN_WARPS);
    }
    __syncthreads();
    if (!finishing) return;
    float y = sigmoid(gate) * parts[pairs + row][tile_row];
#pragma unroll
    for (int j = 0; j < TOP_K; j++) y += chosen.weight[row][j] * parts[row * TOP_K + j][tile_row];
    a.x[(int64_t)row * a.hidden + n] = residual + y;
}
KERNEL __launch_bounds__(32 * DOWN_WARPS, 2) experts_down_4(const __grid_constant__ DownArguments a) { down_rows<1>(a); }
KERNEL __launch_bounds__(32 * DOWN_WARPS, 2) experts_down_8(const __grid_constant__ DownArguments a) { down_rows<2>(a); }

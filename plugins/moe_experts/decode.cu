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
};

struct PreparedAct {
    int item, first;  // or -1
    float factor, factor_up;
};

struct UpWork {
    static constexpr bool EARLY = false;
    const UpArguments& a;
    Chosen& chosen;
    Tile tile;
    int item, from;  // of `tile`; the item's first tile

    DEVICE void choose() { choose_experts(chosen, a.router_logits, a.input.rows, false); }
    DEVICE int tiles_of_item() const { return (a.inner + 7) >> 3; }
    DEVICE int tiles() const { return chosen.count * tiles_of_item(); }
    DEVICE int format_at(int, int& until) const {
        until = 0x7fffffff;
        return a.format;
    }
    DEVICE void point(int index) {
        item = from = 0;
        advance(index);
    }
    DEVICE void advance(int index) {
        int k = a.input.k, tiles = tiles_of_item();
        while (index - from >= tiles) item++, from += tiles;
        int64_t gate = (int64_t)chosen.expert[item] * 2 * a.inner, up = gate + a.inner;
        int bytes = bytes_of(k, a.format), scales = k / 16;
        tile = make_tile(a.weight + gate * bytes, a.scale + gate * scales, a.weight + up * bytes, a.scale + up * scales,
                         (index - from) * 8, a.inner, k, a.format);
    }
    DEVICE PreparedAct prepare(int index) const {
        int tiles = tiles_of_item();
        PreparedAct p = {0, 0, 0.f, 0.f};
        while (index >= tiles && p.item < chosen.count) p.item++, index -= tiles;
        if (p.item == chosen.count) return p;
        const float* scale_2 = a.scale_2 + 2 * chosen.expert[p.item];
        p.first = index * 8;
        p.factor = factor_of(a.format, scale_2), p.factor_up = factor_of(a.format, scale_2 + 1);
        return p;
    }
    DEVICE void ask(PreparedAct&) const {}
    DEVICE void finish(const PreparedAct& p, const Staged& staged, const Partial& partial, int place) const {
        int lane = threadIdx.x & 31, j = lane & 7;
        for (int row = lane >> 3; row < a.input.rows && p.first + j < a.inner; row += 4) {
            int slot = chosen.slot[p.item][row];
            if (slot < 0) continue;
            float rms = rms_factor(staged, a.input, row);
            float gate = partial.get(place, row, j) * (rms * p.factor);
            float up = partial.get(place, row, j + 8) * (rms * p.factor_up);
            a.act[(int64_t)(row * TOP_K + slot) * a.inner + p.first + j] = silu(gate) * up;
        }
    }
    DEVICE void turned(bool, const Staged&) const {}
};

template <int SETS>
DEVICE void up_rows(const UpArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Staged staged;
    __shared__ Chosen chosen;
    UpWork work = {a, chosen};
    go_through_tiles<SETS>(a.input, shared_memory, staged, work);
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
    int depth;                     // passes that a warp has under way
};

constexpr int DOWN_WARPS = 12;

// A warp stages a row of activations; returns what to multiply its products with.
DEVICE float stage_row(uint8_t* vectors, const float* x, int k, int format) {
    int lane = threadIdx.x & 31, stride = vector_bytes(k);
    uint32_t largest = 0;
    for (int from = lane * 8; from < k; from += 2 * PIECE) {
        float v[2][8] = {};
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (from + i * PIECE < k) load_eight(v[i], x + from + i * PIECE);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (from + i * PIECE < k) put_raw(vectors + chunk_place((from + i * PIECE) / 8), stride, v[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) largest = max(largest, magnitude_bits(v[i][j]));
        }
    }
    largest = __reduce_max_sync(ALL_LANES, largest);
    float scale = scale_of(largest, format);
    for (int at = lane * 8; at < k; at += PIECE) split_raw(vectors + chunk_place(at / 8), stride, scale, format);
    return unscale_of(largest, format);
}

// One block per 16 rows of the down projections; its warps take an expert each. Item 0 is the shared expert.
template <int SETS>
DEVICE void down_rows(const DownArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Chosen chosen;
    __shared__ float parts[MAX_ROWS * (TOP_K + 1)][TILE];  // [pair, tile row]; a pair: a row's place, or its shared expert
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, first = blockIdx.x * TILE;
    int pairs = a.rows * TOP_K, stride = 2 * vector_bytes(a.inner), shared_stride = 2 * vector_bytes(a.shared_inner);
    Slot* slots = (Slot*)shared_memory + warp * a.depth;
    uint8_t* vectors = (uint8_t*)((Slot*)shared_memory + DOWN_WARPS * a.depth);
    auto vectors_of = [&](int pair) { return pair < pairs ? pair * stride : pairs * stride + (pair - pairs) * shared_stride; };
    auto pair_of = [&](int item, int row) {  // or -1
        if (row >= a.rows) return -1;
        int slot = item ? chosen.slot[item - 1][row] : 0;
        return slot < 0 ? -1 : item ? row * TOP_K + slot : pairs + row;
    };

    choose_experts(chosen, a.router_logits, a.rows, true);  // two kernels old, see common.cuh
    int items = 1 + chosen.count;
    auto find = [&](int item) {
        if (!item) {
            const Segment& s = a.shared;
            return make_tile(s.weight, s.scale, 0, 0, first, a.hidden, a.shared_inner, s.format);
        }
        int64_t row = (int64_t)chosen.expert[item - 1] * a.hidden;
        return make_tile(a.weight + row * bytes_of(a.inner, a.format), a.scale + row * (a.inner / 16), 0, 0, first,
                         a.hidden, a.inner, a.format);
    };
    auto end_of = [&](int item) { return item ? bytes_of(a.inner, a.format) : bytes_of(a.shared_inner, a.shared.format); };
    int next_item = warp, next_at = 0, next_end = 0;
    Tile next;
    if (next_item < items) next = find(next_item), next_end = end_of(next_item);
    auto fetch_next = [&](int slot) {
        if (next_item < items) {
            fetch(slots[slot], next, next_at, next_end);
            next_at += PASS;
            if (next_at >= next_end) {
                next_item += DOWN_WARPS, next_at = 0;
                if (next_item < items) next = find(next_item), next_end = end_of(next_item);
            }
        }
        copy_commit();
    };
    for (int slot = 0; slot < a.depth; slot++) fetch_next(slot);
    float factor = 1.f;
    auto find_factor = [&](int item) {
        if (item < items)
            factor = item ? factor_of(a.format, a.scale_2 + chosen.expert[item - 1]) : factor_of(a.shared.format, a.shared.scale_2);
    };
    find_factor(warp);
    wait_for_previous();
    launch_next();
    int tile_row = threadIdx.x % TILE, row = threadIdx.x / TILE, n = first + tile_row;
    bool finishing = row < a.rows && n < a.hidden;
    float gate = 0.f, residual = 0.f;
    if (finishing) gate = __ldcg(a.shared_gate + row), residual = __ldcg(a.x + (int64_t)row * a.hidden + n);

    Sums<SETS> sums;
    int slot = 0;
    for (int item = warp; item < items; item += DOWN_WARPS) {
        float unscale[SETS] = {};
        int any = -1, format = item ? a.format : a.shared.format, columns[SETS];
        for (int r = 0; r < a.rows; r++) {
            int pair = pair_of(item, r);
            if (pair < 0) continue;
            const float* x = item ? a.act + (int64_t)pair * a.inner : a.shared_act + r * a.shared_inner;
            float u = stage_row(vectors + vectors_of(pair), x, item ? a.inner : a.shared_inner, format);
            any = pair;
#pragma unroll
            for (int s = 0; s < SETS; s++)
                if (r == s * SET_ROWS + t) unscale[s] = u;
        }
        __syncwarp();
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            int pair = pair_of(item, s * SET_ROWS + (g >> 1));
            columns[s] = vectors_of(pair < 0 ? any : pair) + (g & 1) * (item ? stride : shared_stride) / 2;
        }
        sums.clear();
        int end = end_of(item);
        for (int at = 0; at < end; at += PASS) {
            wait_for_pass(a.depth);
            multiply(sums, slots[slot], format, at, 0, end, vectors, columns);
            __syncwarp();
            fetch_next(slot);
            slot = slot + 1 == a.depth ? 0 : slot + 1;
        }
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            int pair = pair_of(item, s * SET_ROWS + t);
            if (pair < 0) continue;
            parts[pair][g] = sums.total(s, 0) * (unscale[s] * factor);
            parts[pair][g + 8] = sums.total(s, 1) * (unscale[s] * factor);
        }
        find_factor(item + DOWN_WARPS);
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

// The routed experts and the shared one on 1..8 rows, after plugins/moe_routing/routing.cuh chose the experts. Ops:
// Nvfp4MoeExperts, FloatMoeExperts, with the norm in front and the residual behind.
//
// An expert that several rows want is read once. experts_up writes silu(gate) * up as the entries that experts_down
// multiplies; experts_down adds a row's experts in the order of its routing, whatever the other rows are.
#include "linear/stage.cuh"
#include "moe_routing/routing.cuh"

struct UpArguments {
    Input input;
    const Routing* routing;
    const uint8_t* weight;  // [E, 2 I, H]: gate rows, then up rows
    const uint8_t* scale;   // NVFP4: E4M3 [E, 2 I, H / 16]
    const float* scale_2;   // NVFP4: [E, 2]
    uint4* act;             // entries [T, TOP_K, I / 4]
    int format;
    int inner;
};

struct PreparedAct {
    int pair;  // row * TOP_K + slot, or -1
    float factor, factor_up;
};

KERNEL __launch_bounds__(THREADS, RESIDENT) experts_up(const __grid_constant__ UpArguments a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Staged staged;
    int tiles = (a.inner + 7) / 8, k = a.input.k;
    auto total = [&] { return __ldcg(&a.routing->count) * tiles; };
    auto find = [&](int index) {
        int item = index / tiles;
        int64_t gate = (int64_t)__ldcg(&a.routing->expert[item]) * 2 * a.inner, up = gate + a.inner;
        const uint8_t* scale = a.scale;
        int bytes = bytes_of(k, a.format), scales = k / 16;
        return make_tile(a.weight + gate * bytes, scale + gate * scales, a.weight + up * bytes, scale + up * scales,
                         index % tiles * 8, a.inner, k, a.format, item);
    };
    auto prepare = [&](const Tile& tile, int thread) {
        int row = thread / 8;
        PreparedAct p = {-1, 0.f, 0.f};
        if (row >= a.input.rows || tile.first + thread % 8 >= a.inner) return p;
        int slot = __ldcg(&a.routing->slot[tile.id][row]);
        const float* scale_2 = a.scale_2 + 2 * __ldcg(&a.routing->expert[tile.id]);
        float factor = rms_factor(staged, a.input, row);
        p.pair = slot < 0 ? -1 : row * TOP_K + slot;
        p.factor = factor * factor_of(a.format, scale_2);
        p.factor_up = factor * factor_of(a.format, scale_2 + 1);
        return p;
    };
    auto finish = [&](const Tile& tile, int thread, const Partial& partial, const PreparedAct& p) {
        if (p.pair < 0) return;
        float gate = partial.get(thread % 8, thread / 8) * p.factor;
        float up = partial.get(thread % 8 + 8, thread / 8) * p.factor_up;
        uint4* act = a.act + (int64_t)p.pair * (a.inner / 4);
        put_value(act, tile.first + thread % 8, silu(gate) * up, a.format == NVFP4);
    };
    go_through_tiles<false>(a.input, shared_memory, staged, total, find, [] {}, prepare, finish, [](int) {});
}

struct DownArguments {
    const Routing* routing;
    const uint8_t* weight;         // [E, H, I]
    const uint8_t* scale;          // NVFP4: [E, H, I / 16]
    const float* scale_2;          // NVFP4: [E]
    const uint4* act;              // entries [T, TOP_K, I / 4]
    Segment shared;                // the shared expert's down projection: weight, scale, scale_2, format
    const uint4* shared_act;       // entries [T, Is / 4]
    const float* shared_gate;      // [T]: its logit
    float* x;                      // [T, H]: x += experts
    int format;
    int inner;
    int shared_inner;
    int hidden;
    int rows;
    int padding;
};

constexpr int DOWN_WARPS = 16;
constexpr int DOWN_DEPTH = 2;

// One block per 16 rows of the down projections; its warps take an expert each. Item 0 is the shared expert.
KERNEL __launch_bounds__(32 * DOWN_WARPS, 1) experts_down(const __grid_constant__ DownArguments a) {
    extern __shared__ uint4 shared_memory[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, first = blockIdx.x * TILE;
    int stride = a.inner / 4, shared_stride = a.shared_inner / 4, pairs = a.rows * TOP_K;
    Pipeline<DOWN_DEPTH>& pipeline = ((Pipeline<DOWN_DEPTH>*)shared_memory)[warp];
    uint4* entries = shared_memory + DOWN_WARPS * sizeof(Pipeline<DOWN_DEPTH>) / sizeof(uint4);
    uint4* shared_entries = entries + pairs * stride;
    float* parts = (float*)(shared_entries + a.rows * shared_stride);  // [item, tile row, row]

    int items = 1 + __ldcg(&a.routing->count);  // two kernels old, see common.cuh
    auto find = [&](int item) {
        if (!item) {
            const Segment& s = a.shared;
            return make_tile(s.weight, s.scale, 0, 0, first, a.hidden, a.shared_inner, s.format, 0);
        }
        int64_t row = (int64_t)__ldcg(&a.routing->expert[item - 1]) * a.hidden;
        return make_tile(a.weight + row * bytes_of(a.inner, a.format), a.scale + row * (a.inner / 16), 0, 0, first,
                         a.hidden, a.inner, a.format, item);
    };
    int next_item = warp, next_at = 0;
    Tile next;
    if (next_item < items) next = find(next_item);
    auto fetch_next = [&](int slot) {
        if (next_item < items) {
            fetch(pipeline, slot, next, next_at);
            next_at += PASS;
            if (next_at >= next.row_bytes) {
                next_item += DOWN_WARPS, next_at = 0;
                if (next_item < items) next = find(next_item);
            }
        }
        copy_commit();
    };
    for (int slot = 0; slot < DOWN_DEPTH; slot++) fetch_next(slot);
    wait_for_previous();
    launch_next();
    for (int i = threadIdx.x; i < pairs * stride; i += blockDim.x) {
        int pair = i / stride;
        entries[pair * stride + entry_place(i % stride, pair)] = __ldcg(a.act + i);
    }
    for (int i = threadIdx.x; i < a.rows * shared_stride; i += blockDim.x) {
        int row = i / shared_stride;
        shared_entries[row * shared_stride + entry_place(i % shared_stride, row)] = __ldcg(a.shared_act + i);
    }
    __syncthreads();

    Sums sums;
    int slot = 0;
    for (int item = warp; item < items; item += DOWN_WARPS) {
        Tile tile = find(item);
        int row = g < a.rows ? g : 0;
        int place = item ? max(__ldcg(&a.routing->slot[item - 1][row]), 0) : 0;
        int pair = item ? row * TOP_K + place : row;
        int own = 16 * (int)((item ? entries + pair * stride : shared_entries + pair * shared_stride) - shared_memory);
        sums.clear();
        for (int at = 0; at < tile.row_bytes; at += PASS) {
            copy_wait<DOWN_DEPTH - 1>();
            __syncwarp();
            multiply(sums, pipeline, slot, tile.format, at, tile.row_bytes, shared_memory, own, pair);
            __syncwarp();
            fetch_next(slot);
            slot ^= 1;
        }
        int column = (lane & 3) * 2;
        const float* scale_2 = item ? a.scale_2 + __ldcg(&a.routing->expert[item - 1]) : a.shared.scale_2;
        float factor = factor_of(tile.format, scale_2);
        float* out = parts + item * TILE * MAX_ROWS;
#pragma unroll
        for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * MAX_ROWS + column + i % 2] = sums.total(i) * factor;
    }
    __syncthreads();
    int tile_row = threadIdx.x % TILE, row = threadIdx.x / TILE, n = first + tile_row;
    if (row >= a.rows || n >= a.hidden) return;
    float y = sigmoid(__ldcg(a.shared_gate + row)) * parts[tile_row * MAX_ROWS + row];
    for (int j = 0; j < TOP_K; j++) {
        int place = __ldcg(&a.routing->item[row][j]);
        y += __ldcg(&a.routing->weight[row][j]) * parts[((place + 1) * TILE + tile_row) * MAX_ROWS + row];
    }
    a.x[(int64_t)row * a.hidden + n] = __ldcg(a.x + (int64_t)row * a.hidden + n) + y;
}

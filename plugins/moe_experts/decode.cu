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

template <int STEPS>
DEVICE void experts_up(const UpArguments& a) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Shared shared;
    int tiles = (a.inner + 7) / 8, bytes = bytes_of(a.input.k, a.format), g = (threadIdx.x & 31) >> 2;
    auto total = [&] { return __ldcg(&a.routing->count) * tiles; };
    auto find = [&](int index) {
        int item = index / tiles, first = index % tiles * 8;
        int64_t gate = (int64_t)__ldcg(&a.routing->expert[item]) * 2 * a.inner + min(first + g, a.inner - 1);
        int64_t up = gate + a.inner;
        const uint8_t* scale = a.scale;
        int scales = a.input.k / 16;
        RowPair rows = {a.weight + gate * bytes, a.weight + up * bytes, scale + gate * scales, scale + up * scales};
        return Tile{rows, bytes, a.format, first, item};
    };
    auto finish = [&](const Tile& tile, int buffer) {
        int tile_row = threadIdx.x % 8, row = threadIdx.x / 8, n = tile.first + tile_row;
        if (row >= a.input.rows || n >= a.inner) return;
        int slot = __ldcg(&a.routing->slot[tile.id][row]);
        if (slot < 0) return;
        const float* scale_2 = a.scale_2 + 2 * __ldcg(&a.routing->expert[tile.id]);
        float factor = rms_factor(shared, a.input, row);
        float gate = sum_of_warps(shared, buffer, tile_row, row) * (factor * factor_of(a.format, scale_2));
        float up = sum_of_warps(shared, buffer, tile_row + 8, row) * (factor * factor_of(a.format, scale_2 + 1));
        put_value(a.act + (int64_t)(row * TOP_K + slot) * (a.inner / 4), n, silu(gate) * up, a.format == NVFP4);
    };
    go_through_tiles<STEPS, false>(a.input, shared_memory, shared, total, find, [] {}, finish);
}

KERNEL __launch_bounds__(THREADS, 2) experts_up_2(const __grid_constant__ UpArguments a) { experts_up<2>(a); }
KERNEL __launch_bounds__(THREADS, 2) experts_up_4(const __grid_constant__ UpArguments a) { experts_up<4>(a); }
KERNEL __launch_bounds__(THREADS, 1) experts_up_8(const __grid_constant__ UpArguments a) { experts_up<8>(a); }

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
constexpr int DOWN_STEPS = 4;

// One block per 16 rows of the down projections; its warps take an expert each. Item 0 is the shared expert.
KERNEL __launch_bounds__(32 * DOWN_WARPS, 1) experts_down(const __grid_constant__ DownArguments a) {
    extern __shared__ uint4 shared_memory[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, first = blockIdx.x * TILE;
    int stride = entry_stride(a.inner), shared_stride = entry_stride(a.shared_inner), pairs = a.rows * TOP_K;
    uint4* entries = shared_memory;
    uint4* shared_entries = entries + pairs * stride;
    float* parts = (float*)(shared_entries + a.rows * shared_stride);  // [item, tile row, row]

    int items = 1 + __ldcg(&a.routing->count);  // two kernels old, see common.cuh
    auto find = [&](int item) {
        int format = item ? a.format : a.shared.format, k = item ? a.inner : a.shared_inner, bytes = bytes_of(k, format);
        int64_t base = item ? (int64_t)__ldcg(&a.routing->expert[item - 1]) * a.hidden : 0;
        int64_t low = base + min(first + g, a.hidden - 1), high = base + min(first + g + 8, a.hidden - 1);
        const uint8_t *weight = item ? a.weight : a.shared.weight, *scale = item ? a.scale : a.shared.scale;
        RowPair rows = {weight + low * bytes, weight + high * bytes, scale + low * (k / 16), scale + high * (k / 16)};
        return Tile{rows, bytes, format, first, item};
    };
    int item = warp, offset = (lane & 3) * 16;
    Tile tile;
    Weights<DOWN_STEPS> weights;
    if (item < items) {
        tile = find(item);
        load(weights, tile.rows, tile.format, offset, tile.row_bytes);
    }
    wait_for_previous();
    launch_next();
    for (int i = threadIdx.x; i < pairs * (a.inner / 4); i += blockDim.x) {
        int pair = i / (a.inner / 4), entry = i % (a.inner / 4);
        copy_async16(entries + pair * stride + entry_place(entry), a.act + i, true);
    }
    for (int i = threadIdx.x; i < a.rows * (a.shared_inner / 4); i += blockDim.x) {
        int row = i / (a.shared_inner / 4), entry = i % (a.shared_inner / 4);
        copy_async16(shared_entries + row * shared_stride + entry_place(entry), a.shared_act + i, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();

    Sums sums;
    sums.clear();
    for (int at = offset; item < items;) {
        int slot = g >= a.rows ? -1 : item ? __ldcg(&a.routing->slot[item - 1][g]) : 0;
        const uint4* own = item ? entries + (g * TOP_K + slot) * stride : shared_entries + g * shared_stride;
        auto entry = [&](int i, bool valid) {
            return slot >= 0 && valid ? own[entry_place(i)] : make_uint4(0, 0, 0, 0);
        };
        multiply<DOWN_STEPS>(sums, weights, tile.format, at, tile.row_bytes, entry);
        Tile finished = tile;
        at += DOWN_STEPS * STEP;
        bool last = at - offset >= tile.row_bytes;
        if (last) at = offset, item += DOWN_WARPS;
        if (item < items) {
            if (last) tile = find(item);
            load(weights, tile.rows, tile.format, at, tile.row_bytes);
        }
        if (last) {
            int id = finished.id, column = (lane & 3) * 2;
            const float* scale_2 = id ? a.scale_2 + __ldcg(&a.routing->expert[id - 1]) : a.shared.scale_2;
            float factor = factor_of(finished.format, scale_2);
            float* out = parts + id * TILE * MAX_ROWS;
#pragma unroll
            for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * MAX_ROWS + column + i % 2] = sums.total(i) * factor;
            sums.clear();
        }
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

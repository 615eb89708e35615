// Gated attention of 1..8 rows at the end of the cache. attention_decode goes once through the cache, attention_combine
// joins what its blocks found; plugins/gated_attention/__init__.py has the math.
//
// The cache is cut into tiles of 64 slots and groups of GROUP_TILES tiles, from slot 0. A row's softmax is that of each
// tile, joined tile by tile within a group and group by group in attention_combine. Where the context is short, a block
// takes single tiles and attention_combine joins these too, by the same operations: a row's bits depend on its position
// alone.
#include "gated_attention/decode_tile.cuh"

constexpr int GROUP_TILES = 4;

struct DecodeArguments {
    const float* q_gate;               // row t at t * q_stride: [Hq, 2, D], query and gate of each head
    const float* k;                    // row t at t * k_stride: [Hkv, D]
    const float* v;
    const float* q_norm;               // [D], zero-centred
    const float* k_norm;
    const float* inverse_frequencies;  // [ROTARY_DIM / 2]
    const int* position;               // row t stands at *position + position_offset + t
    const int* query_row;              // null, or the one row that attends
    void* kv_cache;                    // [2, Hkv, S, D]
    float* partial;                    // [entries, Hkv, queries, GROUP, D]: a tile's or a group's weights v, not divided
    float2* partial_softmax;           // [entries, Hkv, queries, GROUP]: Softmax of each
    float* y;                          // [queries, Hq, D]
    int q_stride;
    int k_stride;
    int v_stride;
    int position_offset;
    int capacity;                      // S
    int rows;                          // new keys and values
    int short_tiles;                   // up to so many tiles the entries are tiles, else groups
    float epsilon;
    int late;                          // attention_combine: a launch follows that reads the cache before its wait
};

DEVICE int first_position(const DecodeArguments& a) { return *a.position + a.position_offset; }
DEVICE int tile_count(int last_position) { return last_position / TILE + 1; }

DEVICE void put_row(char* tile, char* rows, int start, int slot, const float (&value)[PAIRS][2]) {
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        int pair = (threadIdx.x & 31) + 32 * j, byte = pair * (CACHE_ROW / (HEAD_DIM / 2));
        if (HEAD_DIM % 64 && pair >= HEAD_DIM / 2) continue;
        uint32_t code = encode(value[j]);
        store_pair(rows + (int64_t)slot * CACHE_ROW, pair, code);
        char* chunk = tile + tile_offset<CACHE_ROW>(slot - start, byte / 16);
        store_pair(chunk, pair % (16 * (HEAD_DIM / 2) / CACHE_ROW), code);
    }
}

// New rows of the tile: to the cache, where nobody else reads them in this launch, and to shared memory.
DEVICE void append_rows(const DecodeArguments& a, char* shared, const float2* turns, int kv_head, int start, int first) {
    for (int t = threadIdx.x / 32; t < a.rows; t += WARPS) {
        int slot = first + t;
        if (slot < start || slot >= start + TILE) continue;
        HeadRow row, weight;
        float value[PAIRS][2];
        load_row(row, a.k + (int64_t)t * a.k_stride + kv_head * HEAD_DIM);
        load_pairs(value, a.v + (int64_t)t * a.v_stride + kv_head * HEAD_DIM);
        load_row(weight, a.k_norm);
        norm_and_turn(row, weight, turns + t * HALF, a.epsilon);
        put_row(shared, cache_rows(a.kv_cache, KEYS, kv_head, a.capacity), start, slot, row.value);
        put_row(shared + TILE_BYTES, cache_rows(a.kv_cache, VALUES, kv_head, a.capacity), start, slot, value);
    }
}

template <int QUERIES>
DEVICE void put_partial(const DecodeArguments& a, int entry, int kv_head, const Softmax (&all)[Layout<QUERIES>::OWN],
                        const float (&sums)[MIX_STEPS][Layout<QUERIES>::EIGHTS][4]) {
    using L = Layout<QUERIES>;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4;
    int64_t first = ((int64_t)entry * NUM_KV_HEADS + kv_head) * L::COLUMNS;
#pragma unroll
    for (int i = 0; i < L::OWN; i++) {
        int column = warp + i * WARPS;
        if (lane == 0 && column < L::COLUMNS) a.partial_softmax[first + column] = make_float2(all[i].largest, all[i].sum);
    }
#pragma unroll
    for (int n = 0; n < L::EIGHTS; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int column = n * 8 + lane % 4 * 2 + j % 2;
            if (L::COLUMNS % 8 && column >= L::COLUMNS) continue;
            float* out = a.partial + (first + column) * HEAD_DIM + (KV_FP8 ? 2 * g + j / 2 : g + j / 2 * 8);
#pragma unroll
            for (int i = 0; i < MIX_STEPS; i++) {
                int step = warp + i * WARPS;
                if (STEPS % WARPS == 0 || step < STEPS) out[step * 16] = sums[i][n][j];
            }
        }
}

template <int QUERIES>
DEVICE void clear(Softmax (&all)[Layout<QUERIES>::OWN], float (&sums)[MIX_STEPS][Layout<QUERIES>::EIGHTS][4]) {
#pragma unroll
    for (int i = 0; i < Layout<QUERIES>::OWN; i++) all[i] = empty_softmax();
#pragma unroll
    for (int i = 0; i < MIX_STEPS; i++)
#pragma unroll
        for (int n = 0; n < Layout<QUERIES>::EIGHTS; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][n][j] = 0.f;
}

template <int QUERIES>
DEVICE void load_queries(const DecodeArguments& a, HeadRow (&query)[Layout<QUERIES>::OWN], int kv_head, int query_row) {
#pragma unroll
    for (int i = 0; i < Layout<QUERIES>::OWN; i++) {
        int column = min((int)threadIdx.x / 32 + i * WARPS, QUERIES * GROUP - 1), head = kv_head * GROUP + column % GROUP;
        load_row(query[i], a.q_gate + (int64_t)(query_row + column / GROUP) * a.q_stride + head * 2 * HEAD_DIM);
    }
}

template <int QUERIES>
DEVICE void put_queries(char* shared, HeadRow (&query)[Layout<QUERIES>::OWN], const HeadRow& weight,
                        const float2* turns, float epsilon) {
    using L = Layout<QUERIES>;
#pragma unroll
    for (int i = 0; i < L::OWN; i++) {
        int column = threadIdx.x / 32 + i * WARPS;
        if (L::COLUMNS % WARPS && column >= L::COLUMNS) break;
        norm_and_turn(query[i], weight, turns + column / GROUP * HALF, epsilon);
        put_query<L::EIGHTS>(shared + L::QUERY, column, query[i], LOG2_E / sqrtf((float)HEAD_DIM));
    }
}

// Grid (blocks, Hkv): a block takes the entries blockIdx.x, blockIdx.x + gridDim.x, ... of its KV head. Old cache slots,
// position and query_row are read before the wait, so no kernel since the last late one (common.cuh) may write them.
template <int QUERIES>
DEVICE void decode(const DecodeArguments& a) {
    using L = Layout<QUERIES>;
    extern __shared__ uint4 shared_memory[];
    mark_start(4, a.rows);
    launch_next();
    char* shared = (char*)shared_memory;
    float2* turns = (float2*)(shared + L::TURNS);
    int kv_head = blockIdx.y, first = first_position(a), end = first + a.rows;
    int query_row = a.query_row ? *a.query_row : 0;
    int tiles = tile_count(end - 1), span = tiles <= a.short_tiles ? 1 : GROUP_TILES;
    int tile = blockIdx.x * span;
    if (tile >= tiles) return;  // at once: its place is for the next kernels; the first block waits in any case
    auto load = [&](Which which, int next) {
        const char* rows = cache_rows(a.kv_cache, which, kv_head, a.capacity);
        if (next < tiles) load_tile(shared + which * TILE_BYTES, rows, next * TILE, first, end);
        copy_commit();
    };
    HeadRow query[L::OWN], weight;
    load(KEYS, tile);
    load(VALUES, tile);
    load_row(weight, a.q_norm);
    for (int t = 0; t < a.rows; t++)
        fill_turns(turns + t * HALF, a.inverse_frequencies, first + t, (threadIdx.x + t * 32) % THREADS, THREADS);
    mark(ASKED);
    wait_for_previous();
    mark(WAITED);
    load_queries<QUERIES>(a, query, kv_head, query_row);
    __syncthreads();  // turns
    append_rows(a, shared, turns, kv_head, tile * TILE, first);
    put_queries<QUERIES>(shared, query, weight, turns + query_row * HALF, a.epsilon);
    Softmax all[L::OWN];
    float sums[MIX_STEPS][L::EIGHTS][4];
    for (bool starts = true; tile < tiles;) {
        bool ends = (tile + 1) % span == 0 || tile + 1 == tiles;
        int next = ends ? (tile / span + gridDim.x) * span : tile + 1;
        if (starts) clear<QUERIES>(all, sums);
        copy_wait<1>();  // this tile's keys
        __syncthreads();
        score_tile<L::EIGHTS>((float*)(shared + L::SCORES), shared, (const uint4*)(shared + L::QUERY));
        __syncthreads();
        load(KEYS, next);
        weigh_tile<QUERIES>(shared, all, tile * TILE, first + query_row);
        copy_wait<1>();  // its values
        __syncthreads();
        mix_tile<L::EIGHTS>(sums, shared + TILE_BYTES, (const uint4*)(shared + L::WEIGHTS),
                            (const float4*)(shared + L::FACTORS));
        if (ends) put_partial<QUERIES>(a, tile / span, kv_head, all, sums);
        mark(ENDED);
        __syncthreads();
        load(VALUES, next);
        append_rows(a, shared, turns, kv_head, next * TILE, first);
        tile = next, starts = ends;
    }
}

// Of up to 64 columns; a block's shared memory holds two tiles and 1.5 to 2 KB for each column of HEAD_DIM 256.
#define DECODE(QUERIES)                                                                                              \
    KERNEL __launch_bounds__(THREADS, QUERIES * GROUP <= 24 ? 2 : 1)                                                 \
        attention_decode_##QUERIES(const __grid_constant__ DecodeArguments a) { decode<QUERIES>(a); }
DECODE(1)
DECODE(2)
DECODE(3)
DECODE(4)
#if NUM_HEADS / NUM_KV_HEADS * 8 <= 64
DECODE(5)
DECODE(6)
DECODE(7)
DECODE(8)
#endif

// Joins the entries of each row and head, and applies the gate. Grid (ceil(D / 64), Hq, queries), 256 threads: a part
// of 16 threads joins every 16th group.
KERNEL __launch_bounds__(THREADS) attention_combine(const __grid_constant__ DecodeArguments a) {
    constexpr int WIDTH = 16, PARTS = THREADS / WIDTH;
    __shared__ float4 part_sums[PARTS][WIDTH];
    __shared__ Softmax part_softmax[PARTS];
    int lane = threadIdx.x % WIDTH, part = threadIdx.x / WIDTH, d = (blockIdx.x * WIDTH + lane) * 4;
    int head = blockIdx.y, query = blockIdx.z, first = first_position(a);
    int row = a.query_row ? *a.query_row : query;
    bool by_tile = tile_count(first + a.rows - 1) <= a.short_tiles, inside = d < HEAD_DIM;
    int tiles = tile_count(first + row), groups = (tiles + GROUP_TILES - 1) / GROUP_TILES;
    const float* gates = a.q_gate + (int64_t)row * a.q_stride + (head * 2 + 1) * HEAD_DIM;
    float4 gate = make_float4(0.f, 0.f, 0.f, 0.f);
    mark_start(5, a.rows);
    if (!a.late) launch_next();
    wait_for_previous();
    mark(WAITED);
    if (a.late) launch_next();
    if (inside && part == 0) gate = __ldcg((const float4*)(gates + d));
    Softmax all = empty_softmax();
    float4 sums = make_float4(0.f, 0.f, 0.f, 0.f);
    auto add = [&](Softmax& into, float4& sum, Softmax softmax, float4 value) {
        float2 factor = join(into, softmax);
        sum.x = fmaf(value.x, factor.y, sum.x * factor.x);
        sum.y = fmaf(value.y, factor.y, sum.y * factor.x);
        sum.z = fmaf(value.z, factor.y, sum.z * factor.x);
        sum.w = fmaf(value.w, factor.y, sum.w * factor.x);
    };
    auto add_entry = [&](Softmax& into, float4& sum, int entry) {
        int64_t index = (((int64_t)entry * NUM_KV_HEADS + head / GROUP) * gridDim.z + query) * GROUP + head % GROUP;
        float2 softmax = a.partial_softmax[index];
        add(into, sum, {softmax.x, softmax.y}, *(const float4*)(a.partial + index * HEAD_DIM + d));
    };
    if (!by_tile) {
#pragma unroll 4
        for (int group = part; inside && group < groups; group += PARTS) add_entry(all, sums, group);
    } else {
        for (int group = part; inside && group < groups; group += PARTS) {
            Softmax joined = empty_softmax();
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int tile = group * GROUP_TILES; tile < (group + 1) * GROUP_TILES; tile++)
                if (tile < tiles) add_entry(joined, sum, tile);
            add(all, sums, joined, sum);
        }
    }
    part_sums[part][lane] = sums;
    if (lane == 0) part_softmax[part] = all;
    mark(MULTIPLIED);
    __syncthreads();
    if (part != 0 || !inside) return;
#pragma unroll
    for (int i = 1; i < PARTS; i++) add(all, sums, part_softmax[i], part_sums[i][lane]);
    float* y = a.y + (int64_t)(query * NUM_HEADS + head) * HEAD_DIM + d;
    *(float4*)y = make_float4(sums.x / all.sum * sigmoid(gate.x), sums.y / all.sum * sigmoid(gate.y),
                              sums.z / all.sum * sigmoid(gate.z), sums.w / all.sum * sigmoid(gate.w));
    mark(ENDED);
}

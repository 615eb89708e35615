// What a round does between its products and mixers: rows of the embedding, the head's inputs, penalties and masks,
// sampling, acceptance.
// Launched by cuda.py. Macro: HIDDEN, the width of an embedding row, a multiple of 8.
//
// Sampling is runtime/sampling.py's, entry by entry. Whatever is added up across threads is an integer and whatever is
// compared across them has one largest value, so the token of a row depends on no order of arrival and on no other row.
// Filters need the row's maximum first, then a histogram: `argmax`, `histogram`, `sample_filtered`, in three launches.
#include "sampling/best.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

// Words of the control block in device memory, mirrored by cuda.py.
enum Control : int {
    POSITION,       // of the last token, which no verify has seen: its row 0
    COMMIT,         // rows of the last verify to commit
    HEAD_ROWS,      // rows that the head has not seen: tokens in head_tokens
    HEAD_POSITION,  // of the first of them
    COUNT,          // tokens of the round
    ERROR,          // set, never cleared here: a row of logits was not finite
    HEAD_LAST,      // HEAD_ROWS - 1, the row that the next draft follows
};

struct Filters {
    float temperature;  // above 0
    float log_min_p;    // logarithm of min_p; -infinity: off
    double top_p;       // 1: off
    int top_k;          // 0: off
    int padding;
};

// ---- rows of the embedding ---------------------------------------------------------------------------------------

constexpr int VECTORS = HIDDEN / 8, PER_THREAD = (VECTORS + THREADS - 1) / THREADS;
static_assert(HIDDEN % 8 == 0, "rows are read 8 entries at a time");

DEVICE void load_embedding(const uint16_t* embedding, int token, int vector, float (&x)[8]) {
    uint4 bits = load_weights(embedding + (int64_t)token * HIDDEN + vector * 8);
    uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = bf16_low(pairs[i]), x[2 * i + 1] = bf16_high(pairs[i]);
}

DEVICE void load_floats(const float* from, float (&x)[8]) {
    float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

DEVICE void store_floats(float* to, const float (&x)[8]) {
    ((float4*)to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// tokens [T], embedding bfloat16 [V, H] -> x [T, H]. Grid: T.
KERNEL embed_rows(const int* tokens, const uint16_t* embedding, float* x) {
    wait_for_previous();
    launch_next();
    int token = tokens[blockIdx.x];
    for (int vector = threadIdx.x; vector < VECTORS; vector += THREADS) {
        float values[8];
        load_embedding(embedding, token, vector, values);
        store_floats(x + (int64_t)blockIdx.x * HIDDEN + vector * 8, values);
    }
}

DEVICE float block_sum(float value) {
    __shared__ float partial[WARPS];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += partial[warp];
    return sum;
}

// The head's rows [T, 2 H] = norm(embedding of the token), norm(hidden), zero-centred norms as in plugins/rms_norm.
// Grid: T, 2 (which half).
KERNEL mtp_inputs(const int* tokens, const uint16_t* embedding, const float* embedding_norm, const float* hidden,
                  const float* hidden_norm, float* out, float epsilon) {
    int row = blockIdx.x, half = blockIdx.y;
    float x[PER_THREAD][8], weight[PER_THREAD][8];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        int vector = i * THREADS + threadIdx.x;
        if (vector < VECTORS) load_floats((half ? hidden_norm : embedding_norm) + vector * 8, weight[i]);
    }
    wait_for_previous();
    launch_next();
    int token = half ? 0 : tokens[row];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        int vector = i * THREADS + threadIdx.x;
        if (vector >= VECTORS) continue;
        if (half) load_floats(hidden + (int64_t)row * HIDDEN + vector * 8, x[i]);
        else load_embedding(embedding, token, vector, x[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += x[i][j] * x[i][j];
    }
    float scale = rsqrtf(block_sum(squares) / HIDDEN + epsilon);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        int vector = i * THREADS + threadIdx.x;
        if (vector >= VECTORS) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) x[i][j] *= scale * (1.f + weight[i][j]);
        store_floats(out + ((int64_t)row * 2 + half) * HIDDEN + vector * 8, x[i]);
    }
}

// ---- noise -------------------------------------------------------------------------------------------------------

struct Words {
    uint32_t word[4];
    DEVICE uint32_t at(uint32_t i) const { return i & 2 ? (i & 1 ? word[3] : word[2]) : i & 1 ? word[1] : word[0]; }
};

// Philox4x32-10 with counter (c0, c1, c2, 0).
DEVICE Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t key0, uint32_t key1) {
    uint32_t c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        Wide low = (Wide)c0 * 0xD2511F53u, high = (Wide)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(high >> 32) ^ c1 ^ key0, c1 = (uint32_t)high;
        c2 = (uint32_t)(low >> 32) ^ c3 ^ key1, c3 = (uint32_t)low;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// 23 bits, centred in their cell: exact, and never 0 or 1.
DEVICE float to_uniform(uint32_t bits) { return ((float)(bits >> 9) + 0.5f) * 0x1p-23f; }
DEVICE float to_gumbel(uint32_t bits) { return -logf(-logf(to_uniform(bits))); }

struct Noise {
    uint32_t position, key0, key1;
    DEVICE Noise(const int* base, int offset, const uint32_t* seed)
        : position(*base + offset + blockIdx.y), key0(seed[0]), key1(seed[1]) {}
    DEVICE Words of_four(uint32_t group) const { return philox(group, position, 0, key0, key1); }
    DEVICE float of(uint32_t entry) const { return to_gumbel(of_four(entry / 4).at(entry % 4)); }
};

// A probe for tests: noise float32 [V] of one position, uniform before and gumbel after the logarithms.
KERNEL noise_values(int vocab, const int* position, int offset, const uint32_t* seed, float* uniform, float* gumbel) {
    wait_for_previous();
    launch_next();
    Noise noise(position, offset, seed);
    for (int entry = blockIdx.x * THREADS + threadIdx.x; entry < vocab; entry += gridDim.x * THREADS) {
        uniform[entry] = to_uniform(noise.of_four(entry / 4).at(entry % 4));
        gumbel[entry] = noise.of(entry);
    }
}

// ---- the best entry of a row -------------------------------------------------------------------------------------

constexpr int MAX_LIST_BITS = 20;  // of an entry's index

DEVICE Wide* list_of(Row& row) { return (Wide*)(&row + 1); }

DEVICE float from_ordered(uint32_t ordered) {
    return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

DEVICE Wide warp_best(Wide packed) {
    uint32_t high = (uint32_t)(packed >> 32), highest = __reduce_max_sync(ALL_LANES, high);
    uint32_t low = __reduce_max_sync(ALL_LANES, high == highest ? (uint32_t)packed : 0);
    return (Wide)highest << 32 | low;
}

// Of all threads, in warp 0.
DEVICE Wide block_best(Wide packed) {
    __shared__ Wide partial[WARPS];
    __syncthreads();
    packed = warp_best(packed);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = packed;
    __syncthreads();
    return warp_best(partial[threadIdx.x % WARPS]);
}

DEVICE void add_best(Row& row, Wide packed) {
    packed = block_best(packed);
    if (threadIdx.x == 0 && packed) atomicMax(&row.best, packed);
}

// Four values from entry 4 * group on; `past` beyond the end. Rows whose width is no multiple of 4 are not aligned.
template <typename Four, typename Value>
DEVICE void load_four(const Value* row, int group, int vocab, Value past, Value (&x)[4]) {
    if (vocab % 4 == 0 && group < vocab / 4) {
        Four four = ((const Four*)row)[group];
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = group * 4 + i < vocab ? row[group * 4 + i] : past;
}

// Those of the four that are not past the end; at least one is not.
DEVICE void store_four(float* row, int group, int vocab, const float (&x)[4]) {
    if (vocab % 4 == 0) {
        ((float4*)row)[group] = make_float4(x[0], x[1], x[2], x[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (group * 4 + i < vocab) row[group * 4 + i] = x[i];
}

// A block's tile of a row of logits: GROUPS groups of four per thread, -infinity past the end.
template <int GROUPS>
struct Tile {
    float x[GROUPS][4];
    DEVICE Tile(const float* logits, int vocab) {
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
            load_four<float4>(logits + (int64_t)blockIdx.y * vocab, group(i), vocab, __uint_as_float(0xff800000u),
                              x[i]);
    }
    DEVICE int group(int i) const { return (blockIdx.x * GROUPS + i) * THREADS + threadIdx.x; }
};

// logits [T, V] -> the first of the largest of each row, and that logit in the scratch. Grid: tiles of 2, T.
KERNEL argmax(const float* logits, int vocab, uint8_t* scratch, Tokens tokens, int* error) {
    wait_for_previous();
    launch_next();
    Tile<2> tile(logits, vocab);
    Best best;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) best.offer(rank_of(tile.x[i][j], tile.x[i][j]), tile.group(i) * 4 + j);
    Row& row = row_at(scratch, vocab, blockIdx.y);
    add_best(row, best.packed());
    if (!is_last_block(row) || threadIdx.x) return;
    uint32_t rank = write_token(row, tokens, error, blockIdx.y);
    row.maximum = __uint_as_float(is_valid(rank) ? __float_as_uint(from_ordered(rank)) : 0x7fffffffu);
}

// logits [T, V] -> the entry where logit / temperature + noise is largest. Grid: tiles of 2, T.
KERNEL sample(const float* logits, int vocab, float temperature, const int* position, int offset, const uint32_t* seed,
              uint8_t* scratch, Tokens tokens, int* error) {
    wait_for_previous();
    launch_next();
    Tile<2> tile(logits, vocab);
    Noise noise(position, offset, seed);
    Best best;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        Words words = noise.of_four(tile.group(i));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float x = tile.x[i][j];
            best.offer(rank_of(x, x / temperature + to_gumbel(words.word[j])), tile.group(i) * 4 + j);
        }
    }
    Row& row = row_at(scratch, vocab, blockIdx.y);
    add_best(row, best.packed());
    if (is_last_block(row) && threadIdx.x == 0) write_token(row, tokens, error, blockIdx.y);
}

// ---- filters -----------------------------------------------------------------------------------------------------
// Entries fall into bins by their distance from the maximum. One beyond all bins is dropped without changing anything:
// more than 34 below, its mass rounds to 0, and its noise, between -2.9 and 16.7 as all noise, cannot make it the best.
constexpr float BINS_PER_UNIT = 60.f;

DEVICE int bin_of(float scaled, float maximum) {
    float place = (maximum - scaled) * BINS_PER_UNIT;
    return place < (float)BINS ? (int)place : BINS;  // not finite: BINS
}

// exp(scaled - maximum) in units of 2^-40, whose sums are exact in whatever order.
DEVICE Wide mass_of(float scaled, float maximum) { return (Wide)(expf(scaled - maximum) * 0x1p40f); }

// top_p keeps an entry when the mass of what is more likely is below this.
DEVICE Wide mass_to_keep(double top_p, Wide total) {
    double exact = top_p * (double)total;
    Wide mass = (Wide)exact;
    if ((double)mass < exact) ++mass;
    return mass < total ? mass : total;
}

// In shared memory, where 64-bit atomics are loops: so two words and a carry, and most masses are below 2^32.
template <int SIZE>
struct Histogram {
    uint32_t count[SIZE], low[SIZE], high[SIZE];
    DEVICE void clear() {
        for (int bin = threadIdx.x; bin < SIZE; bin += THREADS) count[bin] = low[bin] = high[bin] = 0;
    }
    DEVICE void add_mass(int bin, Wide mass) {
        uint32_t part = (uint32_t)mass, before = atomicAdd(&low[bin], part);
        uint32_t carried = (uint32_t)(mass >> 32) + (before + part < part);
        if (carried) atomicAdd(&high[bin], carried);
    }
    DEVICE Wide mass(int bin) const { return (Wide)high[bin] << 32 | low[bin]; }
};

// The sum of the values of the threads before this one; `total`: of all.
DEVICE Wide sum_before(Wide value, Wide& total) {
    __shared__ Wide partial[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Wide inclusive = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        Wide other = __shfl_up_sync(ALL_LANES, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) partial[warp] = inclusive;
    __syncthreads();
    Wide before = inclusive - value;
    total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        if (i < warp) before += partial[i];
        total += partial[i];
    }
    return before;
}

struct Cut {
    int first, last;
    Wide count, mass;  // in the bins before `first`
};

// The last block of a row: where top_k and top_p fall. Empties the histogram.
DEVICE void find_cut(Row& row, const Filters& filters) {
    constexpr int EACH = BINS / THREADS;
    __shared__ Cut cut;
    Wide mass[EACH], masses = 0, all_mass, all_count;
    uint32_t count[EACH], counts = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int bin = threadIdx.x * EACH + i;
        masses += mass[i] = row.mass[bin];
        counts += count[i] = row.count[bin];
        row.mass[bin] = 0, row.count[bin] = 0;
    }
    Wide mass_before = sum_before(masses, all_mass), count_before = sum_before(counts, all_count);
    bool has_top_k = filters.top_k > 0 && all_count >= filters.top_k;  // else the last it keeps is beyond the bins
    if (threadIdx.x == 0) cut = {BINS, BINS - 1, 0, all_mass};
    __syncthreads();
    Wide masses_yet = mass_before, counts_yet = count_before;
    for (int i = 0; i < EACH && has_top_k; ++i) {
        int bin = threadIdx.x * EACH + i;
        if (counts_yet < filters.top_k && filters.top_k <= counts_yet + count[i])
            cut = {bin, bin, counts_yet, masses_yet};
        masses_yet += mass[i], counts_yet += count[i];
    }
    __syncthreads();
    // With top_k the mass to keep is not known to the bit, but at least this; without, it is this.
    Wide target = filters.top_p < 1 ? mass_to_keep(filters.top_p, cut.mass) : 0;
    __syncthreads();
    masses_yet = mass_before, counts_yet = count_before;
    for (int i = 0; i < EACH; ++i) {
        int bin = threadIdx.x * EACH + i;
        if (masses_yet < target && target <= masses_yet + mass[i])
            cut = {bin, has_top_k ? cut.last : bin, counts_yet, masses_yet};
        masses_yet += mass[i], counts_yet += count[i];
    }
    __syncthreads();
    if (threadIdx.x) return;
    row.first = cut.first, row.last = cut.last, row.sure_mass = cut.mass, row.window_mass = all_mass;
    row.keep = has_top_k ? filters.top_k - (uint32_t)cut.count : 0;
}

// Numbers and masses of the entries in each bin, and from them what sample_filtered needs. Grid: tiles of 4, T.
KERNEL histogram(const float* logits, int vocab, Filters filters, uint8_t* scratch) {
    __shared__ Histogram<BINS> bins;
    bins.clear();
    wait_for_previous();
    launch_next();
    Tile<4> tile(logits, vocab);
    Row& row = row_at(scratch, vocab, blockIdx.y);
    float maximum = row.maximum / filters.temperature;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float scaled = tile.x[i][j] / filters.temperature;
            int bin = bin_of(scaled, maximum);
            if (bin == BINS) continue;
            atomicAdd(&bins.count[bin], 1u);
            if (filters.top_p < 1) bins.add_mass(bin, mass_of(scaled, maximum));
        }
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        if (!bins.count[bin]) continue;
        atomicAdd(&row.count[bin], bins.count[bin]);
        if (bins.mass(bin)) atomicAdd(&row.mass[bin], bins.mass(bin));
    }
    if (is_last_block(row)) find_cut(row, filters);
}

// A listed entry: in falling order as top_p takes them, the lower index first among equals.
constexpr uint32_t LIST_MASK = (1u << MAX_LIST_BITS) - 1;
DEVICE Wide to_listed(float scaled, uint32_t index) {
    return (Wide)to_ordered(scaled) << MAX_LIST_BITS | (LIST_MASK - index);
}
DEVICE float scaled_of(Wide listed) { return from_ordered((uint32_t)(listed >> MAX_LIST_BITS)); }
DEVICE uint32_t index_of(Wide listed) { return LIST_MASK - ((uint32_t)listed & LIST_MASK); }

struct List {
    const Wide* entries;
    int count;
    Wide base;  // at most the least entry
    int bits;       // of the differences from it
    float maximum;
};

// Radix select among the entries from `least` up. Each weighs 1, or its mass; weights are added from the largest entry
// down, and the entry with which the sum reaches `target` is the last to keep. Returns a lower bound of the entries to
// keep. Not before the lowest `stop` bits: entries that differ in these alone are kept together.
DEVICE Wide select(const List& list, Wide least, int stop, bool by_mass, Wide target) {
    __shared__ Histogram<THREADS> digits;
    __shared__ int digit;
    __shared__ Wide above;
    Wide prefix = 0, total;
    int shift = list.bits;
    while (shift > stop) {
        int width = shift - stop < 8 ? shift - stop : 8;
        shift -= width;
        digits.clear();
        if (threadIdx.x == 0) digit = 0, above = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < list.count; i += THREADS) {
            Wide entry = list.entries[i], key = entry - list.base;
            if (entry < least || key >> shift >> width != prefix) continue;
            int bin = (uint32_t)(key >> shift) & ((1u << width) - 1);
            atomicAdd(&digits.count[bin], 1u);
            if (by_mass) digits.add_mass(bin, mass_of(scaled_of(entry), list.maximum));
        }
        __syncthreads();
        int mine = THREADS - 1 - threadIdx.x;
        Wide weight = by_mass ? digits.mass(mine) : digits.count[mine];
        Wide before = sum_before(weight, total);
        if (before < target && target <= before + weight) digit = mine, above = before;
        __syncthreads();
        prefix = prefix << width | digit;
        target -= above;
        bool only_one = digits.count[digit] <= 1;
        __syncthreads();
        if (only_one) break;
    }
    Wide bound = list.base + (prefix << shift);
    return bound > least ? bound : least;
}

// Base and bits of a list, for which its values must be known.
DEVICE void find_range(List& list) {
    __shared__ uint32_t least;
    __shared__ uint32_t largest;
    if (threadIdx.x == 0) least = 0xffffffffu, largest = 0;
    __syncthreads();
    uint32_t low = 0xffffffffu, high = 0;
    for (int i = threadIdx.x; i < list.count; i += THREADS) {
        uint32_t value = (uint32_t)(list.entries[i] >> MAX_LIST_BITS);
        low = value < low ? value : low, high = value > high ? value : high;
    }
    atomicMin(&least, low);
    atomicMax(&largest, high);
    __syncthreads();
    list.base = (Wide)least << MAX_LIST_BITS;
    list.bits = MAX_LIST_BITS + 32 - __clz((int)(largest - least));
}

// The last block of a row: the best of the listed entries that pass the filters.
DEVICE Wide best_of_list(const Row& row, List list, const Filters& filters, float floor, const Noise& noise) {
    find_range(list);
    Wide least = row.keep ? select(list, 0, MAX_LIST_BITS, false, row.keep) : 0;
    if (filters.top_p < 1) {
        Wide total = row.window_mass;
        if (row.keep) {
            Wide mass = 0;
            for (int i = threadIdx.x; i < list.count; i += THREADS)
                if (list.entries[i] >= least) mass += mass_of(scaled_of(list.entries[i]), list.maximum);
            sum_before(mass, total);
            total += row.sure_mass;
        }
        least = select(list, least, 0, true, mass_to_keep(filters.top_p, total) - row.sure_mass);
    }
    Wide best = 0;
    for (int i = threadIdx.x; i < list.count; i += THREADS) {
        Wide entry = list.entries[i];
        float scaled = scaled_of(entry);
        if (entry < least || scaled < floor) continue;
        Best one;
        one.offer(to_ordered(scaled + noise.of(index_of(entry))), index_of(entry));
        best = one.packed() > best ? one.packed() : best;
    }
    return best;
}

// Lists the entry in each lane that has one to list; all lanes call.
DEVICE void append(Row& row, Wide* list, bool has_one, Wide entry) {
    uint32_t lanes = __ballot_sync(ALL_LANES, has_one);
    if (!lanes) return;
    int lane = threadIdx.x % 32, leader = __ffs(lanes) - 1;
    uint32_t start = 0;
    if (lane == leader) start = atomicAdd(&row.listed, (uint32_t)__popc(lanes));
    start = __shfl_sync(ALL_LANES, start, leader);
    if (has_one) list[start + __popc(lanes & ((1u << lane) - 1))] = entry;
}

// After `argmax` and, with top_k or top_p, `histogram`. Grid: tiles of 2, T.
KERNEL sample_filtered(const float* logits, int vocab, Filters filters, const int* position, int offset,
                       const uint32_t* seed, uint8_t* scratch, Tokens tokens, int* error) {
    constexpr int SHARED_LIST = 2048;
    __shared__ Wide shared_list[SHARED_LIST];
    wait_for_previous();
    launch_next();
    Tile<2> tile(logits, vocab);
    Noise noise(position, offset, seed);
    Row& row = row_at(scratch, vocab, blockIdx.y);
    Wide* list = list_of(row);
    bool has_cut = filters.top_k > 0 || filters.top_p < 1;
    int first = has_cut ? row.first : BINS, last = has_cut ? row.last : BINS - 1;
    float maximum = row.maximum / filters.temperature, floor = maximum + filters.log_min_p;
    Best best;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float scaled[4];
        int bin[4];
        bool any = false;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            scaled[j] = tile.x[i][j] / filters.temperature;
            bin[j] = bin_of(scaled[j], maximum);
            append(row, list, bin[j] >= first && bin[j] <= last, to_listed(scaled[j], tile.group(i) * 4 + j));
            any |= bin[j] < first && scaled[j] >= floor;
        }
        if (!any) continue;
        Words words = noise.of_four(tile.group(i));
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (bin[j] < first && scaled[j] >= floor)
                best.offer(to_ordered(scaled[j] + to_gumbel(words.word[j])), tile.group(i) * 4 + j);
    }
    add_best(row, best.packed());
    if (!is_last_block(row)) return;
    int count = row.listed;
    if (count) {
        bool fits = count <= SHARED_LIST;
        for (int i = threadIdx.x; fits && i < count; i += THREADS) shared_list[i] = list[i];
        add_best(row, best_of_list(row, {fits ? shared_list : list, count, 0, 0, maximum}, filters, floor, noise));
    }
    if (threadIdx.x) return;
    row.listed = 0;
    write_token(row, tokens, error, blockIdx.y);
}

// ---- penalties, bias, masks --------------------------------------------------------------------------------------

constexpr float MASKED = -1e30f;  // finite at any temperature, so that only what came in not finite is an error

struct Penalties {
    float repetition, presence, frequency;
};

struct Steering {
    const int* occurrences;   // [V]: twice the times an entry stands in the answer, plus 1 if it stands in the prompt
    const Penalties* params;  // in device memory: a captured graph serves every request
    const float* bias;        // [V]
    const uint32_t* allowed;  // [T, allowed_stride], or null: bit v % 32 of word v / 32 is entry v's
    int allowed_stride;
    int padding;
};

// Each operation rounded by itself, never fused with the next: the bits are those of the same steps on the host.
DEVICE float steer(float logit, int occurrences, const Penalties& by, float bias) {
    int count = occurrences >> 1;
    if (occurrences) logit = logit > 0 ? __fdiv_rn(logit, by.repetition) : __fmul_rn(logit, by.repetition);
    logit = __fsub_rn(logit, __fmul_rn(by.frequency, (float)count));
    if (count) logit = __fsub_rn(logit, by.presence);
    return __fadd_rn(logit, bias);
}

// logits [T, V] -> out [T, V], another buffer. Row t comes after tokens[1] to tokens[first + t], which `occurrences`
// does not count yet. Grid: tiles of 1, T.
KERNEL steer_logits(const float* logits, int vocab, const int* tokens, int first, Steering steering, float* out) {
    wait_for_previous();
    launch_next();
    int row = blockIdx.y;
    Tile<1> tile(logits, vocab);
    int group = tile.group(0), occurrences[4];
    if (group * 4 >= vocab) return;
    float bias[4];
    load_four<int4>(steering.occurrences, group, vocab, 0, occurrences);
    load_four<float4>(steering.bias, group, vocab, 0.f, bias);
    Penalties penalties = *steering.params;
    uint32_t allowed = ALL_LANES;
    if (steering.allowed)
        allowed = steering.allowed[(int64_t)row * steering.allowed_stride + group / 8] >> group % 8 * 4;
    for (int j = 1; j <= first + row; ++j) {
        int token = tokens[j];
#pragma unroll
        for (int i = 0; i < 4; ++i) occurrences[i] += token == group * 4 + i ? 2 : 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        tile.x[0][i] = allowed >> i & 1 ? steer(tile.x[0][i], occurrences[i], penalties, bias[i]) : MASKED;
    store_four(out + (int64_t)row * vocab, group, vocab, tile.x[0]);
}

// One warp, after accept_drafts: the tokens of the round, of which one may come twice, into `occurrences`.
KERNEL count_tokens(const int* out_tokens, const int* control, int* occurrences) {
    wait_for_previous();
    launch_next();
    if ((int)threadIdx.x < control[COUNT]) atomicAdd(&occurrences[out_tokens[threadIdx.x]], 2);
}

// ---- acceptance --------------------------------------------------------------------------------------------------

// One warp. sampled [K + 1]: the main model's tokens after each row; drafts [K]. The longest prefix on which they agree
// is accepted; with simulate >= 0 draft i is, instead, with that probability. Writes the tokens of the round, then -1,
// into out_tokens [K + 1], the same padded with the last of them into head_tokens [K + 1], and that last one, which
// starts the next verify, into verify_tokens[0].
KERNEL accept_drafts(const int* sampled, const int* drafts, int draft_count, float simulate, const uint32_t* seed,
                     int* control, int* verify_tokens, int* head_tokens, int* out_tokens) {
    wait_for_previous();
    launch_next();
    int lane = threadIdx.x, position = control[POSITION];
    bool agrees = false;
    if (lane < draft_count) {
        float uniform = to_uniform(philox(0, position + 1 + lane, 1, seed[0], seed[1]).word[0]);
        agrees = simulate >= 0 ? uniform < simulate : sampled[lane] == drafts[lane];
    }
    int accepted = __ffs(__ballot_sync(ALL_LANES, !agrees)) - 1;
    int token = sampled[lane < accepted ? lane : accepted], last = __shfl_sync(ALL_LANES, token, accepted);
    if (lane <= draft_count) {
        out_tokens[lane] = lane <= accepted ? token : -1;
        head_tokens[lane] = token;
    }
    if (lane) return;
    verify_tokens[0] = last;
    control[POSITION] = position + accepted + 1;
    control[COMMIT] = control[HEAD_ROWS] = control[COUNT] = accepted + 1;
    control[HEAD_POSITION] = position;
    control[HEAD_LAST] = accepted;
}

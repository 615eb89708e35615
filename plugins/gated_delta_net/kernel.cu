// The Gated DeltaNet mixer between its projections; plugins/gated_delta_net/__init__.py has the math.
//
// A layer's memory is recurrent_state [Hv, Dk, Dv] and a ring of projection rows: the row of absolute position p,
// [qkv_in C | z Hv Dv | b Hv | a Hv], lies in slot p % RING. A rejected row is overwritten by the next call, and both
// the pending rows (the `commit` rows before `position`) and the convolution's history are found by position alone.
//
// A block owns COLUMNS columns of one head's state. LANES threads share a column: thread `part` of a column holds the
// rows k = 4 (m LANES + part) + e of it in registers. All rows, pending or new, decode or prefill, take one `step`.
#include "common.cuh"

#ifndef RING
#define RING 32
#endif

constexpr int CONV_KERNEL = 4;
constexpr int MAX_ROWS = 8;  // of a decode call, and of its pending rows
constexpr int KEY_WIDTH = NUM_K_HEADS * HEAD_K_DIM, VALUE_WIDTH = NUM_V_HEADS * HEAD_V_DIM;
constexpr int CHANNELS = 2 * KEY_WIDTH + VALUE_WIDTH;
constexpr int Z_OFFSET = CHANNELS, B_OFFSET = Z_OFFSET + VALUE_WIDTH, A_OFFSET = B_OFFSET + NUM_V_HEADS;
// Whole cache lines: a pending row read before the wait must not bring a piece of a row still being written.
constexpr int ROW_STRIDE = (A_OFFSET + NUM_V_HEADS + 31) / 32 * 32;
constexpr int GROUP = NUM_V_HEADS / NUM_K_HEADS;  // value heads of a key head
constexpr float L2_EPSILON = 1e-6f;

constexpr int COLUMNS = HEAD_V_DIM % 32 ? 16 : 32;
constexpr int LANES = HEAD_K_DIM % 32 ? 4 : 8;
constexpr int THREADS = COLUMNS * LANES, WARPS = THREADS / 32;
constexpr int WARP_COLUMNS = 32 / LANES;
constexpr int VALUES = HEAD_K_DIM / LANES;  // of the state, per thread
constexpr int CHUNKS = COLUMNS / 4;         // float4 of a state's row that a block owns

// A row ready for the recurrence, in shared memory: q [Dk] | k [Dk] | v [COLUMNS] | decay, beta, q·k, 0; as float4.
constexpr int SLOT_V = HEAD_K_DIM / 2, SLOT_GATES = SLOT_V + CHUNKS, SLOT = SLOT_GATES + 1;

static_assert((RING & (RING - 1)) == 0 && RING >= 2 * MAX_ROWS + CONV_KERNEL - 1, "pending rows, history, new rows");
static_assert(HEAD_K_DIM % 16 == 0 && HEAD_K_DIM <= 128 && HEAD_V_DIM % 16 == 0 && HEAD_V_DIM <= 128, "head sizes");
static_assert(NUM_V_HEADS % NUM_K_HEADS == 0, "value heads share key heads evenly");

// ---- from a projection row to q, k, v and the gates --------------------------------------------------------------

DEVICE const float* ring_row(const float* ring, int position) {
    return position < 0 ? nullptr : ring + (position & (RING - 1)) * ROW_STRIDE;
}

DEVICE float4 load4(const float* row, int channel, bool valid) {
    return valid && row ? *(const float4*)(row + channel) : float4{0.f, 0.f, 0.f, 0.f};
}

struct Taps4 {
    float4 channel[4];  // conv_weight of four neighbouring channels
};

DEVICE Taps4 load_taps(const float* conv_weight, int channel) {
    const float4* taps = (const float4*)conv_weight + channel;
    return {{taps[0], taps[1], taps[2], taps[3]}};
}

// With the quick division: the exact one branches, and a lane's nine values would then come one after another.
DEVICE float convolve(float4 taps, float x0, float x1, float x2, float x3) {
    const float x = fmaf(taps.w, x3, fmaf(taps.z, x2, fmaf(taps.y, x1, taps.x * x0)));
    return __fdividef(x, 1.f + __expf(-x));
}

// x: the raw rows of four positions, the oldest first.
DEVICE float4 convolve4(const Taps4& taps, const float4 (&x)[CONV_KERNEL]) {
    return {convolve(taps.channel[0], x[0].x, x[1].x, x[2].x, x[3].x),
            convolve(taps.channel[1], x[0].y, x[1].y, x[2].y, x[3].y),
            convolve(taps.channel[2], x[0].z, x[1].z, x[2].z, x[3].z),
            convolve(taps.channel[3], x[0].w, x[1].w, x[2].w, x[3].w)};
}

DEVICE float dot4(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }
DEVICE float4 scale4(float4 a, float by) { return {a.x * by, a.y * by, a.z * by, a.w * by}; }

// The query and key of a key head, four elements a lane, and q·k in every lane.
struct Keys {
    float4 q, k;
    float product;
};

DEVICE Keys normalised(float4 q, float4 k) {
    const float qq = warp_sum(dot4(q, q)), kk = warp_sum(dot4(k, k)), qk = warp_sum(dot4(q, k));
    const float q_scale = rsqrtf((qq + L2_EPSILON) * HEAD_K_DIM);  // with Dk^-0.5
    const float k_scale = rsqrtf(kk + L2_EPSILON);
    return {scale4(q, q_scale), scale4(k, k_scale), qk * q_scale * k_scale};
}

struct Gates {
    float decay, beta;
};

// b, a: the row's; softplus(x) = max(x, 0) + log(1 + exp(-|x|)) loses nothing at either end.
DEVICE Gates gates_of(float b, float a, float A_log, float dt_bias) {
    const float x = a + dt_bias;
    const float softplus = fmaxf(x, 0.f) + log1pf(expf(fminf(x, -x)));
    return {expf(-expf(A_log) * softplus), __fdividef(1.f, 1.f + expf(-b))};
}

// ---- the recurrence ----------------------------------------------------------------------------------------------

struct Place {
    int column, part;  // of the block's COLUMNS, of the column's LANES
};

DEVICE Place place() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return {warp * WARP_COLUMNS + lane % WARP_COLUMNS, lane / WARP_COLUMNS};
}

struct Row {
    float q[VALUES], k[VALUES];
    float v, decay, beta, product;
};

DEVICE Row load_row(const float4* slot, Place at) {
    Row row;
#pragma unroll
    for (int m = 0; m < VALUES / 4; ++m) {
        const float4 q = slot[m * LANES + at.part], k = slot[HEAD_K_DIM / 4 + m * LANES + at.part];
        row.q[4 * m] = q.x, row.q[4 * m + 1] = q.y, row.q[4 * m + 2] = q.z, row.q[4 * m + 3] = q.w;
        row.k[4 * m] = k.x, row.k[4 * m + 1] = k.y, row.k[4 * m + 2] = k.z, row.k[4 * m + 3] = k.w;
    }
    const float4 gates = slot[SLOT_GATES];
    row.v = ((const float*)(slot + SLOT_V))[at.column];
    row.decay = gates.x, row.beta = gates.y, row.product = gates.z;
    return row;
}

// Applies a row to the state; returns its o of the column, in every lane of it. Both products are taken with the state
// before the row, so that they travel together: q·S_new = decay q·S + (q·k) delta.
DEVICE float step(float (&state)[VALUES], const Row& row) {
    float along_k[4] = {}, along_q[4] = {};
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        along_k[i % 4] = fmaf(row.k[i], state[i], along_k[i % 4]);
        along_q[i % 4] = fmaf(row.q[i], state[i], along_q[i % 4]);
    }
    float k_sum = (along_k[0] + along_k[1]) + (along_k[2] + along_k[3]);
    float q_sum = (along_q[0] + along_q[1]) + (along_q[2] + along_q[3]);
#pragma unroll
    for (int offset = 16; offset >= WARP_COLUMNS; offset /= 2) {
        k_sum += __shfl_xor_sync(ALL_LANES, k_sum, offset);
        q_sum += __shfl_xor_sync(ALL_LANES, q_sum, offset);
    }
    const float delta = row.beta * fmaf(-row.decay, k_sum, row.v);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) state[i] = fmaf(row.k[i], delta, row.decay * state[i]);
    return fmaf(row.product, delta, row.decay * q_sum);
}

// A block's part of the state passes through shared memory, so that global memory sees 16-byte pieces of full rows.
// The pieces of a row are permuted such that the threads of a warp, 4 rows apart, use different banks.
DEVICE int piece(int k, int chunk) { return k * CHUNKS + (chunk ^ (k / 4 % LANES % CHUNKS)); }
constexpr int PASS = 4 * LANES;  // rows of the state after which the permutation repeats: one piece a thread

DEVICE void fetch_state(float4* stage, const float* state) {
    const int k = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    stage += piece(k, chunk), state += k * HEAD_V_DIM + 4 * chunk;
#pragma unroll
    for (int i = 0; i < HEAD_K_DIM; i += PASS) copy_async16(stage + i * CHUNKS, state + i * HEAD_V_DIM, true);
    copy_commit();
}

DEVICE void store_state(float* state, const float4* stage) {
    const int k = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    stage += piece(k, chunk), state += k * HEAD_V_DIM + 4 * chunk;
#pragma unroll
    for (int i = 0; i < HEAD_K_DIM; i += PASS) *(float4*)(state + i * HEAD_V_DIM) = stage[i * CHUNKS];
}

// The staged values of a thread are own[index(0)], own[index(1)]...
DEVICE float* own_values(float4* stage, Place at) {
    return (float*)(stage + piece(4 * at.part, at.column / 4)) + at.column % 4;
}
DEVICE int index(int i) { return (i / 4 * PASS + i % 4) * COLUMNS; }

DEVICE void read_state(float (&state)[VALUES], float4* stage, Place at) {
    const float* own = own_values(stage, at);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) state[i] = own[index(i)];
}

DEVICE void write_state(float4* stage, const float (&state)[VALUES], Place at) {
    float* own = own_values(stage, at);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) own[index(i)] = state[i];
}

// ---- decode ------------------------------------------------------------------------------------------------------

// What a lane needs of the weights to prepare any row for this block: constant, so loaded once.
struct LaneWeights {
    Taps4 q, k;
    float4 v;
    float A_log, dt_bias;
    int head, q_channel, v_channel;
    bool has_key, has_value;
};

DEVICE LaneWeights load_lane(const float* conv_weight, const float* A_log, const float* dt_bias) {
    const int lane = threadIdx.x % 32;
    LaneWeights weights;
    weights.head = blockIdx.y;
    weights.has_key = 4 * lane < HEAD_K_DIM, weights.has_value = lane < COLUMNS;
    weights.q_channel = weights.head / GROUP * HEAD_K_DIM + (weights.has_key ? 4 * lane : 0);
    weights.v_channel = 2 * KEY_WIDTH + weights.head * HEAD_V_DIM + blockIdx.x * COLUMNS + (weights.has_value ? lane : 0);
    weights.q = load_taps(conv_weight, weights.q_channel);
    weights.k = load_taps(conv_weight, KEY_WIDTH + weights.q_channel);
    weights.v = ((const float4*)conv_weight)[weights.v_channel];
    weights.A_log = A_log[weights.head], weights.dt_bias = dt_bias[weights.head];
    return weights;
}

// A warp turns the ring's row of one position into a slot of shared memory.
DEVICE void prepare_row(float4* slot, const float* ring, int position, const LaneWeights& weights) {
    const int lane = threadIdx.x % 32;
    float4 q[CONV_KERNEL], k[CONV_KERNEL];
    float v[CONV_KERNEL];
#pragma unroll
    for (int i = 0; i < CONV_KERNEL; ++i) {
        const float* row = ring_row(ring, position - (CONV_KERNEL - 1) + i);
        q[i] = load4(row, weights.q_channel, weights.has_key);
        k[i] = load4(row, KEY_WIDTH + weights.q_channel, weights.has_key);
        v[i] = row ? row[weights.v_channel] : 0.f;
    }
    const float* row = ring_row(ring, position);
    const Gates gates = gates_of(row[B_OFFSET + weights.head], row[A_OFFSET + weights.head], weights.A_log, weights.dt_bias);
    const Keys keys = normalised(convolve4(weights.q, q), convolve4(weights.k, k));
    if (weights.has_key) slot[lane] = keys.q, slot[HEAD_K_DIM / 4 + lane] = keys.k;
    if (weights.has_value) ((float*)(slot + SLOT_V))[lane] = convolve(weights.v, v[0], v[1], v[2], v[3]);
    if (lane == 0) slot[SLOT_GATES] = {gates.decay, gates.beta, keys.product, 0.f};
}

// Applies the `commit` pending rows to the state, writes it, and runs `rows` (0..8) rows from `position` on top.
// Grid (Dv / COLUMNS, Hv). The kernel right before may write the ring's rows from `position` on, but neither scalar,
// nor older rows: the pending rows are applied before the wait. One body serves both phases, hence the same bits.
KERNEL __launch_bounds__(THREADS, 2) gdn_decode(
    const float* ring,         // [RING, ROW_STRIDE]
    const float* conv_weight,  // [C, 4]
    const float* A_log,        // [Hv]
    const float* dt_bias,      // [Hv]
    float* recurrent_state,    // [Hv, Dk, Dv]
    const int* position,       // of row 0
    const int* commit,         // 0..8
    int rows,
    float* o                   // [rows, Hv Dv]
) {
    __shared__ float4 stage[HEAD_K_DIM * CHUNKS];
    __shared__ float4 slots[MAX_ROWS][SLOT];
    const int warp = threadIdx.x / 32, head = blockIdx.y, first_column = blockIdx.x * COLUMNS;
    float* block_state = recurrent_state + head * HEAD_K_DIM * HEAD_V_DIM + first_column;
    fetch_state(stage, block_state);
    const LaneWeights weights = load_lane(conv_weight, A_log, dt_bias);
    const int start = *position, pending = *commit;
    const Place at = place();
    const int first_phase = pending ? 0 : 1;
    float state[VALUES];
#pragma unroll 1
    for (int phase = first_phase; phase < 2; ++phase) {
        if (phase) {
            wait_for_previous();
            launch_next();
        }
        const int count = phase ? rows : pending, first = phase ? start : start - pending;
        for (int row = warp; row < count; row += WARPS) prepare_row(slots[row], ring, first + row, weights);
        if (phase && pending) store_state(block_state, stage);
        if (phase == first_phase) copy_wait<0>();
        __syncthreads();
        if (phase == first_phase) read_state(state, stage, at);
#pragma unroll 1
        for (int row = 0; row < count; ++row) {
            const float out = step(state, load_row(slots[row], at));
            if (phase && at.part == 0) o[row * VALUE_WIDTH + head * HEAD_V_DIM + first_column + at.column] = out;
        }
        if (!phase) {
            write_state(stage, state, at);
            __syncthreads();
        }
    }
}

// ---- prefill -----------------------------------------------------------------------------------------------------

constexpr int PREFILL_WARPS = 8;
constexpr int STAGE_ROWS = 8, STAGES = 3;  // rows copied at a time; stages in flight or in use

// Row `row` of the chunk; the rows before it are the ring's.
DEVICE const float* chunk_row(const float* projections, const float* ring, int position, int row) {
    return row < 0 ? ring_row(ring, position + row) : projections + (int64_t)row * ROW_STRIDE;
}

template <int N>
DEVICE void slide(float4 (&window)[N], float4 next) {
#pragma unroll
    for (int i = 1; i < N; ++i) window[i - 1] = window[i];
    window[N - 1] = next;
}

// Every row's keys [T, Hk, {q, k}, Dk], values [T, Hv Dv] and gates [T, Hv, 4] = {decay, beta, q·k, 0}.
// Grid (T / STAGE_ROWS, (Hk + Hv) / PREFILL_WARPS): a warp takes STAGE_ROWS rows of one key head or one value head.
KERNEL __launch_bounds__(32 * PREFILL_WARPS) gdn_prefill_conv(
    const float* projections,  // [T, ROW_STRIDE]
    const float* ring,
    const float* conv_weight,
    const float* A_log,
    const float* dt_bias,
    const int* position,
    int rows,
    float* keys,
    float* values,
    float* gates
) {
    const int lane = threadIdx.x % 32, unit = blockIdx.y * PREFILL_WARPS + threadIdx.x / 32;
    const int from = blockIdx.x * STAGE_ROWS, to = from + STAGE_ROWS < rows ? from + STAGE_ROWS : rows;
    const bool is_key = unit < NUM_K_HEADS;
    const int head = is_key ? unit : unit - NUM_K_HEADS, width = is_key ? HEAD_K_DIM : HEAD_V_DIM;
    const bool active = head < NUM_V_HEADS && 4 * lane < width;
    const int channel = active ? (is_key ? 0 : 2 * KEY_WIDTH) + head * width + 4 * lane : 0;
    const int k_channel = is_key ? KEY_WIDTH + channel : 0;
    const Taps4 taps = load_taps(conv_weight, channel), k_taps = load_taps(conv_weight, k_channel);
    wait_for_previous();
    launch_next();
    const int start = *position;
    float4 window[CONV_KERNEL] = {}, k_window[CONV_KERNEL] = {};
    for (int row = from - (CONV_KERNEL - 1); row < to; ++row) {
        const float* raw = chunk_row(projections, ring, start, row);
        slide(window, load4(raw, channel, active));
        slide(k_window, load4(raw, k_channel, active && is_key));
        if (row < from) continue;
        const float4 mixed = convolve4(taps, window);
        if (!is_key) {
            if (active) *(float4*)(values + (int64_t)row * VALUE_WIDTH + head * HEAD_V_DIM + 4 * lane) = mixed;
            continue;
        }
        const Keys pair = normalised(mixed, convolve4(k_taps, k_window));
        float4* out = (float4*)(keys + (int64_t)row * 2 * KEY_WIDTH + head * 2 * HEAD_K_DIM) + lane;
        if (active) out[0] = pair.q, out[HEAD_K_DIM / 4] = pair.k;
        for (int i = head * GROUP + lane; i < (head + 1) * GROUP; i += 32) {
            const Gates gate = gates_of(raw[B_OFFSET + i], raw[A_OFFSET + i], A_log[i], dt_bias[i]);
            ((float4*)gates)[row * NUM_V_HEADS + i] = {gate.decay, gate.beta, pair.product, 0.f};
        }
    }
}

// Starts the copies of rows first .. first + STAGE_ROWS into their slots, zeros behind the last.
DEVICE void fetch_rows(
    float4 (&slots)[STAGE_ROWS][SLOT], const float* keys, const float* values, const float* gates, int first, int rows
) {
    const int lane = threadIdx.x % 32, head = blockIdx.y;
    for (int i = threadIdx.x / 32; i < STAGE_ROWS && first + i < rows; i += WARPS) {
        const int64_t row = first + i;
        const float* k = keys + row * 2 * KEY_WIDTH + head / GROUP * 2 * HEAD_K_DIM;
        const float* v = values + row * VALUE_WIDTH + head * HEAD_V_DIM + blockIdx.x * COLUMNS;
#pragma unroll
        for (int j = lane; j < SLOT_V; j += 32) copy_async16(slots[i] + j, k + 4 * j, true);
        if (lane < CHUNKS) copy_async16(slots[i] + SLOT_V + lane, v + 4 * lane, true);
        if (lane == CHUNKS) copy_async16(slots[i] + SLOT_GATES, gates + (row * NUM_V_HEADS + head) * 4, true);
    }
    copy_commit();
}

// Runs all rows through the state and writes it. o may be `values`: a block reads its values before it writes there.
// Grid (Dv / COLUMNS, Hv).
KERNEL __launch_bounds__(THREADS) gdn_prefill_recur(
    const float* keys, const float* values, const float* gates, int rows, float* recurrent_state, float* o
) {
    __shared__ float4 stage[HEAD_K_DIM * CHUNKS];
    __shared__ float4 slots[STAGES][STAGE_ROWS][SLOT];
    const int head = blockIdx.y, first_column = blockIdx.x * COLUMNS;
    float* block_state = recurrent_state + head * HEAD_K_DIM * HEAD_V_DIM + first_column;
    const Place at = place();
    float state[VALUES];
    wait_for_previous();
    launch_next();
    fetch_state(stage, block_state);
    for (int i = 0; i < STAGES - 1; ++i) fetch_rows(slots[i], keys, values, gates, i * STAGE_ROWS, rows);
    float* out = o + head * HEAD_V_DIM + first_column + at.column;  // of the row at hand
    int current = 0, next = STAGES - 1;
    for (int first = 0; first < rows; first += STAGE_ROWS) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // the copies of all threads have come, and the slots of the stage before are free
        if (first == 0) read_state(state, stage, at);
        fetch_rows(slots[next], keys, values, gates, first + (STAGES - 1) * STAGE_ROWS, rows);
        const int count = rows - first < STAGE_ROWS ? rows - first : STAGE_ROWS;
        Row row = load_row(slots[current][0], at);
        for (int i = 0; i < count; ++i) {
            const Row following = load_row(slots[current][i + 1 < STAGE_ROWS ? i + 1 : i], at);
            const float value = step(state, row);
            if (at.part == 0) *out = value;
            out += VALUE_WIDTH;
            row = following;
        }
        next = current;
        current = current + 1 == STAGES ? 0 : current + 1;
    }
    write_state(stage, state, at);
    __syncthreads();
    store_state(block_state, stage);
}

// y = norm_weight * rms(o) * silu(z) as float16, and the chunk's last rows into the ring, as history.
// Grid (T, Hv / PREFILL_WARPS): a warp takes one row of one head.
KERNEL __launch_bounds__(32 * PREFILL_WARPS) gdn_prefill_gate(
    const float* o,            // [T, Hv Dv]
    const float* projections,  // [T, ROW_STRIDE]
    const float* norm_weight,  // [Dv]
    float epsilon,
    const int* position,
    int rows,
    uint16_t* y,               // [T, Hv Dv]
    float* ring
) {
    wait_for_previous();
    launch_next();
    const int lane = threadIdx.x % 32, head = blockIdx.y * PREFILL_WARPS + threadIdx.x / 32, row = blockIdx.x;
    const bool active = head < NUM_V_HEADS && 4 * lane < HEAD_V_DIM;
    const int64_t offset = (int64_t)row * VALUE_WIDTH + head * HEAD_V_DIM;
    const float* raw = projections + (int64_t)row * ROW_STRIDE;
    const float4 value = load4(o + offset, 4 * lane, active), z = load4(raw + Z_OFFSET + head * HEAD_V_DIM, 4 * lane, active);
    const float4 weight = load4(norm_weight, 4 * lane, active);
    const float scale = rsqrtf(warp_sum(dot4(value, value)) / HEAD_V_DIM + epsilon);
    if (active) {
        uint32_t* out = (uint32_t*)(y + offset + 4 * lane);
        out[0] = to_half2(clamp_half(weight.x * (value.x * scale) * silu(z.x)),
                          clamp_half(weight.y * (value.y * scale) * silu(z.y)));
        out[1] = to_half2(clamp_half(weight.z * (value.z * scale) * silu(z.z)),
                          clamp_half(weight.w * (value.w * scale) * silu(z.w)));
    }
    if (row < rows - (CONV_KERNEL - 1)) return;
    float4* history = (float4*)(ring + ((*position + row) & (RING - 1)) * ROW_STRIDE);
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < CHANNELS / 4; i += gridDim.y * blockDim.x)
        history[i] = ((const float4*)raw)[i];
}

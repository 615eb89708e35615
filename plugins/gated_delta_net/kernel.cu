// The Gated DeltaNet mixer between its projections; plugins/gated_delta_net/__init__.py has the math.
//
// A layer's memory is recurrent_state [Hv, Dk, Dv] and a ring of projection rows: the row of absolute position p,
// [qkv_in C | z Hv Dv | b Hv | a Hv], lies in slot p % RING. A rejected row is overwritten by the next call, and both
// the pending rows (the `commit` rows before `position`) and the convolution's history are found by position alone.
#include "gated_delta_net/recurrence.cuh"

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
    weights.v_channel = 2 * KEY_WIDTH + weights.head * HEAD_V_DIM + blockIdx.x * COLUMNS + lane % COLUMNS;
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
    const float b = row[B_OFFSET + weights.head], a = row[A_OFFSET + weights.head];
    const Gates gates = gates_of(b, a, weights.A_log, weights.dt_bias);
    const Keys keys = normalised(convolve4(weights.q, q), convolve4(weights.k, k));
    if (weights.has_key) slot[lane] = keys.q, slot[HEAD_K_DIM / 4 + lane] = keys.k;
    if (weights.has_value) ((float*)(slot + SLOT_V))[lane] = convolve(weights.v, v[0], v[1], v[2], v[3]);
    if (lane == 0) slot[SLOT_GATES] = {gates.decay, gates.beta, keys.product, 0.f};
}

// Applies the `commit` pending rows to the state, writes it, and runs `rows` (0..8) rows from `position` on top.
// Grid (Dv / COLUMNS, Hv). Kernels since the last late one (common.cuh) may write the ring's rows from `position` on, but
// neither scalar nor older rows, and may not touch the state: the pending rows are applied, and the state is written,
// before the wait. One body serves both phases, hence the same bits.
KERNEL __launch_bounds__(THREADS, 2) gdn_decode(
    const float* ring,         // [RING, ROW_STRIDE]
    const float* conv_weight,  // [C, 4]
    const float* A_log,        // [Hv]
    const float* dt_bias,      // [Hv]
    float* recurrent_state,    // [Hv, Dk, Dv]
    const int* position,       // of row 0
    const int* commit,         // 0..8
    const float* norm_weight,  // [Dv]
    int rows,
    float* y,                  // [rows, Hv Dv]: o * norm_weight * silu(z), to be divided by o's root mean square
    float* squares             // [rows, Hv, Dv / COLUMNS]: what that is made of: the sums of o² of the columns
) {
    __shared__ float4 stage[HEAD_K_DIM * CHUNKS];
    __shared__ float4 slots[MAX_ROWS][SLOT];
    __shared__ float outs[MAX_ROWS][COLUMNS];
    mark_start(3, rows);
    launch_next();
    const int warp = threadIdx.x / 32, head = blockIdx.y, first_column = blockIdx.x * COLUMNS;
    float* block_state = recurrent_state + head * HEAD_K_DIM * HEAD_V_DIM + first_column;
    fetch_state(stage, block_state);
    const LaneWeights weights = load_lane(conv_weight, A_log, dt_bias);
    const int start = *position, pending = *commit;
    const int column = threadIdx.x % COLUMNS, own_place = head * HEAD_V_DIM + first_column + column;  // in z and y
    float own_z = 0.f;  // of row `warp`, needed last
    const Place at = place();
    const int first_phase = pending ? 0 : 1;
    float state[VALUES];
#pragma unroll 1
    for (int phase = first_phase; phase < 2; ++phase) {
        if (phase) mark(ASKED), wait_for_previous(), mark(WAITED);
        const int count = phase ? rows : pending, first = phase ? start : start - pending;
        for (int row = warp; row < count; row += WARPS) prepare_row(slots[row], ring, first + row, weights);
        if (phase && warp < rows) own_z = __ldcg(ring_row(ring, start + warp) + Z_OFFSET + own_place);
        if (phase == first_phase) copy_wait<0>();
        __syncthreads();
        if (phase) mark(STAGED);
        if (phase == first_phase) read_state(state, stage, at);
#pragma unroll 1
        for (int row = 0; row < count; ++row) {
            const float out = step(state, load_row(slots[row], at));
            if (phase && at.part == 0) outs[row][at.column] = out;
        }
        if (phase) mark(MULTIPLIED);
        if (!phase) {
            write_state(stage, state, at);
            __syncthreads();
            store_state(block_state, stage);
        }
    }
    __syncthreads();
    for (int row = warp; row < rows; row += WARPS) {
        const int lane = threadIdx.x % 32;
        const float out = outs[row][column];
        const float z = row == warp ? own_z : __ldcg(ring_row(ring, start + row) + Z_OFFSET + own_place);
        const float sum = warp_sum(lane < COLUMNS ? out * out : 0.f);
        if (lane < COLUMNS) y[row * VALUE_WIDTH + own_place] = out * norm_weight[first_column + column] * silu(z);
        if (lane == 0) squares[(row * NUM_V_HEADS + head) * gridDim.x + blockIdx.x] = sum;
    }
    mark(ENDED);
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

// Starts the copies of rows first .. first + STAGE_ROWS into their slots.
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
    const float4 value = load4(o + offset, 4 * lane, active);
    const float4 z = load4(raw + Z_OFFSET + head * HEAD_V_DIM, 4 * lane, active);
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

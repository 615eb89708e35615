// The recurrence of the Gated DeltaNet mixer, shared by decode and prefill: from a projection row to what the state
// needs of it, and the step that applies it.
//
// A block owns COLUMNS columns of one head's state. LANES threads share a column: thread `part` of a column holds the
// rows k = 4 (m LANES + part) + e of it in registers. All rows, pending or new, decode or prefill, take one `step`.
#pragma once
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

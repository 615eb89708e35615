// The kernels of tests/test_emulator.py: what kernels are made of, one at a time.
#include "common.cuh"

extern __shared__ uint4 shared_memory[];

// Sums over the block in two barriers. values: [gridDim, blockDim]
KERNEL block_sums(float* sums, const float* values) {
    wait_for_previous();
    launch_next();
    __shared__ float warps[32];
    float* row = (float*)shared_memory;
    uint32_t thread = threadIdx.x, other = blockDim.x - 1 - thread;
    row[thread] = values[blockIdx.x * blockDim.x + thread];
    __syncthreads();
    float sum = warp_sum(row[other]);
    if (thread % 32 == 0) warps[thread / 32] = sum;
    __syncthreads();
    float total = 0;
    for (uint32_t warp = 0; warp < blockDim.x / 32; warp++) total += warps[warp];
    sums[blockIdx.x * blockDim.x + thread] = total;
}

struct Shuffled {
    uint32_t xor5, down3, up3, from7, rotated, down3_of8, up3_of8, from2_of8;
};

KERNEL shuffles(Shuffled* results, const uint32_t* values) {
    wait_for_previous();
    launch_next();
    uint32_t value = values[threadIdx.x], rotated = threadIdx.x + 1;
    results[threadIdx.x] = {
        __shfl_xor_sync(ALL_LANES, value, 5),     __shfl_down_sync(ALL_LANES, value, 3),
        __shfl_up_sync(ALL_LANES, value, 3),      __shfl_sync(ALL_LANES, value, 7),
        __shfl_sync(ALL_LANES, value, rotated),   __shfl_down_sync(ALL_LANES, value, 3, 8),
        __shfl_up_sync(ALL_LANES, value, 3, 8),   __shfl_sync(ALL_LANES, value, 2, 8),
    };
}

struct Votes {
    uint32_t ballot, some, every, half_ballot, maximum, sum;
};

KERNEL votes(Votes* results, const uint32_t* values, uint32_t* total) {
    wait_for_previous();
    launch_next();
    uint32_t value = values[threadIdx.x], half = 0xffffu << (threadIdx.x & 16);
    results[threadIdx.x] = {__ballot_sync(ALL_LANES, value & 1),  (uint32_t)__any_sync(ALL_LANES, value == 7),
                            (uint32_t)__all_sync(half, value > 2), __ballot_sync(half, value & 2),
                            __reduce_max_sync(ALL_LANES, value),  __reduce_add_sync(half, value)};
    atomicAdd(total, value);
}

// Two halves of a warp, and the warps, meet at different times and numbers of times.
KERNEL divergent(uint32_t* results) {
    wait_for_previous();
    launch_next();
    uint32_t lane = threadIdx.x % 32, value = threadIdx.x;
    if (lane < 16) {
        for (uint32_t i = 0; i <= threadIdx.x / 32; i++) value += __shfl_xor_sync(0xffffu, value, 1);
    } else {
        value = __reduce_add_sync(0xffff0000u, value);
    }
    __syncwarp();
    results[threadIdx.x] = value;
}

// c += a b with a [16, 16] and b [16, 8] from shared memory, through load_matrix.
template <bool BF16>
DEVICE void multiply(float* c, const uint16_t* a, const uint16_t* b) {
    __shared__ __align__(16) uint16_t rows[16][16];
    __shared__ __align__(16) uint16_t columns[16][8];
    uint32_t lane = threadIdx.x;
    for (uint32_t i = lane; i < 256; i += 32) rows[i / 16][i % 16] = a[i];
    for (uint32_t i = lane; i < 128; i += 32) columns[i / 8][i % 8] = b[i];
    __syncwarp();
    uint32_t left[4], right[2];
    load_matrix_x4(left, &rows[lane % 16][lane / 16 * 8]);
    load_matrix_x2_transposed(right, columns[lane % 16]);
    float sums[4];
    for (int i = 0; i < 4; i++) sums[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    if (BF16)
        mma_bf16(sums, left, right[0], right[1]);
    else
        mma_half(sums, left, right[0], right[1]);
    for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

KERNEL multiply_bf16(float* c, const uint16_t* a, const uint16_t* b) {
    wait_for_previous();
    launch_next();
    multiply<true>(c, a, b);
}

KERNEL multiply_half(float* c, const uint16_t* a, const uint16_t* b) {
    wait_for_previous();
    launch_next();
    multiply<false>(c, a, b);
}

// matrices: [4, 8, 8]; results: [12, 32], the registers of x4, x4_transposed, x2 and x2_transposed.
KERNEL load_matrices(uint32_t* results, const uint4* matrices) {
    wait_for_previous();
    launch_next();
    uint32_t lane = threadIdx.x, r[12];
    copy_async16(shared_memory + lane, matrices + lane, true);
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    const uint4* row = shared_memory + lane;
    load_matrix_x4(*(uint32_t(*)[4])r, row);
    load_matrix_x4_transposed(*(uint32_t(*)[4])(r + 4), row);
    load_matrix_x2(*(uint32_t(*)[2])(r + 8), row);
    load_matrix_x2_transposed(*(uint32_t(*)[2])(r + 10), row);
    for (int i = 0; i < 12; i++) results[i * 32 + lane] = r[i];
}

// Two stages in flight; invalid rows become zero. x: [blocks of 32, 4], y alike
KERNEL pipeline(uint4* y, const uint4* x, int count, int valid) {
    wait_for_previous();
    launch_next();
    for (int i = 0; i < count + 1; i++) {
        if (i < count) copy_async16(shared_memory + i % 2 * 32 + threadIdx.x, x + i * 32 + threadIdx.x, i < valid);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        if (i) y[(i - 1) * 32 + threadIdx.x] = shared_memory[(i - 1) % 2 * 32 + 31 - threadIdx.x];
        __syncthreads();
    }
}

// Every bit pattern of 16 bits, and floats in all of their ranges.
struct Conversions {
    float from_half, from_bf16, from_e4m3;  // the low one of a pair of bytes
};

KERNEL convert_from(Conversions* results) {
    wait_for_previous();
    launch_next();
    uint32_t bits = blockIdx.x * blockDim.x + threadIdx.x;
    results[bits] = {half_to_float((uint16_t)bits), bf16_low(bits), half_low(e4m3x2_to_half2((uint16_t)bits))};
}

struct Rounded {
    uint32_t halves, bf16s, half;
};

KERNEL convert_to(Rounded* results, const float* x) {
    wait_for_previous();
    launch_next();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    results[i] = {to_half2(x[i], x[i ^ 1]), to_bf16x2(x[i], x[i ^ 1]), to_half(x[i])};
}

KERNEL products(uint32_t* results, const uint32_t* a, const uint32_t* b) {
    wait_for_previous();
    launch_next();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    results[i] = mul_half2(a[i], b[i]);
}

// ---- mistakes: for the emulator only -----------------------------------------------------------------------------

KERNEL barrier_missed() {
    wait_for_previous();
    launch_next();
    if (threadIdx.x != 5) __syncthreads();
}

KERNEL lane_missed(float* y) {
    wait_for_previous();
    launch_next();
    if (threadIdx.x != 5) y[threadIdx.x] = warp_sum(1.f);
}

KERNEL no_wait() { launch_next(); }

KERNEL waits_below(int block, int thread) {
    launch_next();
    if (blockIdx.x < block && threadIdx.x < thread) wait_for_previous();
}

KERNEL writes_at(float* y, int index) {
    wait_for_previous();
    launch_next();
    y[index] = 0;
}

KERNEL copies_vector_at(uint4* y, int index) {
    wait_for_previous();
    launch_next();
    *(uint4*)((float*)y + 4) = *(uint4*)((float*)y + index);
}

KERNEL writes_shared_at(int index) {
    wait_for_previous();
    launch_next();
    ((float*)shared_memory)[index] = 0;
}

KERNEL reads_unwritten(float* y) {
    wait_for_previous();
    launch_next();
    __shared__ float values[32];
    if (threadIdx.x < 31) values[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x] + (threadIdx.x < 31 ? 0 : ((float*)shared_memory)[0]);
}

// The neighbour of the other warp, without a barrier.
KERNEL barrier_forgotten(float* y) {
    wait_for_previous();
    launch_next();
    __shared__ float values[64];
    values[threadIdx.x] = 1;
    y[threadIdx.x] = values[threadIdx.x ^ 32];
}

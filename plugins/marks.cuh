// Marks: where a block's time goes. With TIMELINE defined (tests/bench_timeline.py) its first thread notes the GPU's
// clock; else these are nothing. Included by common.cuh.
#pragma once

enum Mark : int { STARTED, ASKED, WAITED, CHOSEN, STAGED, ARRIVED, MULTIPLIED, ENDED, MARKS };
#ifdef TIMELINE
struct MarkRecord {
    uint32_t kernel, rows, block, multiprocessor;  // kernel: a number of its own
    uint64_t at[MARKS];                            // ns
};
extern "C" __device__ uint32_t mark_count;
extern "C" __device__ MarkRecord mark_records[1 << 16];
__device__ uint32_t mark_count;
__device__ MarkRecord mark_records[1 << 16];

DEVICE MarkRecord*& mark_record() {
    __shared__ MarkRecord* record;
    return record;
}
DEVICE void mark(Mark place) {
    if (threadIdx.x) return;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(mark_record()->at[place]));
}
DEVICE void mark_start(uint32_t kernel, uint32_t rows) {
    if (threadIdx.x) return;
    MarkRecord* record = mark_records + atomicAdd(&mark_count, 1) % (1 << 16);
    mark_record() = record;
    mark(STARTED);
    record->kernel = kernel, record->rows = rows, record->block = blockIdx.x + gridDim.x * blockIdx.y;
    asm volatile("mov.u32 %0, %smid;" : "=r"(record->multiprocessor));
}
#else
DEVICE void mark(Mark) {}
DEVICE void mark_start(uint32_t, uint32_t) {}
#endif

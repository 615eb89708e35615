// Linear layers of many rows (chunks of a prompt), and the norm in front of them. Launcher: plugins/linear/prefill.py.
#include "linear/prefill.cuh"

constexpr int NORM_THREADS = 256;

// y = x * rsqrt(mean(x²) + epsilon) * (1 + weight) as hi + lo, the float16 nearest y and what that rounded off, and as
// float32 `exact`; lo and exact may be null. A block for each row; H a multiple of 4.
KERNEL __launch_bounds__(NORM_THREADS) rms_norm_rows(
    const float* x,       // [T, H], rows x_stride apart
    const float* weight,  // [H]
    uint16_t* hi,         // [T, H], as lo and exact
    uint16_t* lo,
    float* exact,
    int x_stride,
    int h,
    float epsilon) {
    __shared__ float parts[NORM_THREADS / 32];
    wait_for_previous();
    launch_next();
    const float4* row = (const float4*)(x + (int64_t)blockIdx.x * x_stride);
    float squares = 0.f;
    for (int i = threadIdx.x; i < h / 4; i += NORM_THREADS) {
        float4 v = row[i];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < NORM_THREADS / 32; i++) total += parts[i];
    float scale = rsqrtf(total / (float)h + epsilon);
    for (int i = threadIdx.x; i < h / 4; i += NORM_THREADS) {
        float4 v = row[i], w = ((const float4*)weight)[i];
        float4 y = {v.x * scale * (1.f + w.x), v.y * scale * (1.f + w.y), v.z * scale * (1.f + w.z),
                    v.w * scale * (1.f + w.w)};
        uint2 high = {to_half2(clamp_half(y.x), clamp_half(y.y)), to_half2(clamp_half(y.z), clamp_half(y.w))};
        int64_t at = (int64_t)blockIdx.x * (h / 4) + i;
        ((uint2*)hi)[at] = high;
        if (lo) {
            float rest[4] = {y.x - half_low(high.x), y.y - half_high(high.x), y.z - half_low(high.y),
                             y.w - half_high(high.y)};
            ((uint2*)lo)[at] = {to_half2(clamp_half(rest[0]), clamp_half(rest[1])),
                                to_half2(clamp_half(rest[2]), clamp_half(rest[3]))};
        }
        if (exact) ((float4*)exact)[at] = y;
    }
}

// Every segment's product with the rows of x. Grid: a block for each tile of 128 weight rows (SWIGLU: 64 features) and
// tile_tokens <= 128 rows, those that share weights side by side. x_lo may be null where no segment is precise.
KERNEL __launch_bounds__(THREADS, 2) linear_prefill(
    const uint16_t* x,     // float16 [T, K]
    const uint16_t* x_lo,  // float16 [T, K]
    const __grid_constant__ Segments segments,
    int rows,
    int k,
    int tile_tokens) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Tile tile;
    int token_tiles = (rows + tile_tokens - 1) / tile_tokens;
    int row_tile = blockIdx.x / token_tiles, first_token = blockIdx.x % token_tiles * tile_tokens;
    int index = 0, features = 0;
    for (;; index++) {
        features = segments.segment[index].epilogue == SWIGLU ? TILE_ROWS / 2 : TILE_ROWS;
        int tiles = (segments.segment[index].n + features - 1) / features;
        if (row_tile < tiles || index + 1 == segments.count) break;
        row_tile -= tiles;
    }
    const Segment& segment = segments.segment[index];
    int format = segment.format;
    if (threadIdx.x == 0) {
        int first_row = row_tile * features;
        bool paired = segment.epilogue == SWIGLU;
        int64_t weight_start = first_row * row_bytes(format, k), scale_start = (int64_t)first_row * (k / 16);
        int64_t out_start = (int64_t)first_token * segment.out_stride + first_row;
        tile.weight = segment.weight + weight_start;
        tile.weight_up = segment.weight_up + weight_start;
        tile.scale = segment.scale + scale_start;
        tile.scale_up = segment.scale_up + scale_start;
        tile.scale_2 = segment.scale_2;
        tile.scale_2_up = segment.scale_2_up;
        tile.last_row = segment.n - 1 - first_row;
        tile.paired = paired;
        tile.x = x;
        tile.x_rest = segment.precise ? x_lo : nullptr;
        tile.source = nullptr;
        tile.first_token = first_token;
        tile.tokens = min(tile_tokens, rows - first_token);
        tile.k = k;
        tile.epilogue = segment.epilogue;
        tile.out = (uint8_t*)segment.out + out_start * (paired ? 2 : 4);
        tile.out_stride = segment.out_stride;
        tile.features = min(features, segment.n - first_row);
    }
    __syncthreads();
    uint8_t* shared = (uint8_t*)shared_memory;
    if (format == NVFP4) multiply_tile<NVFP4, 32, 64, 96, 128>(tile, shared);
    else if (format == FP8) multiply_tile<FP8, 32, 64, 96, 128>(tile, shared);
    else multiply_tile<BF16, 32, 64, 96, 128>(tile, shared);
}

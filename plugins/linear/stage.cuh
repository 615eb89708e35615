// A block that multiplies rows with tiles of weights; the frame of linear layers and experts_up.
//
// k is cut into eight shares, one for each warp: it stages its share of the rows and multiplies it with its share of
// every tile; the shares' products are joined in a fixed tree. A block leaves room on its multiprocessor: the next
// kernel's moves in while this one works and starts fetching its weights, which keeps memory busy through what kernels
// spend waiting for each other.
#pragma once
#include "tile.cuh"

constexpr int RESIDENT = 2;  // blocks on a multiprocessor: this kernel's and the next one's
constexpr int WARPS = 8;
constexpr int SHARES = WARPS;  // of k
constexpr int THREADS = 32 * WARPS;
constexpr int PIECE = 256;  // k that a warp stages at a time: eight values a lane

struct Input {
    const float* x;             // row t: x + t * x_stride
    const float* norm_weight;   // null, or a zero-centred RMS norm in front
    const float* head_squares;  // null, or [T, k / head_dim, head_parts]: x is to be divided by the root mean square of
    const int* position;        //   every head, whose squares these are. position: of row 0; addresses rings
    float epsilon;
    int x_stride;
    int head_dim;               // a multiple of 16
    int head_parts;
    int k;
    int rows;
    int pool;                   // bytes of shared memory for passes under way
    int late;                   // start the next kernel only after the wait (see common.cuh)
};

struct Staged {
    float squares[MAX_ROWS][SHARES];  // sums of squares of the shares
    uint32_t largest[SHARES][MAX_ROWS];
};

struct Share {
    int begin, end;
};
DEVICE int share_size(int k) { return (k + 64 * SHARES - 1) / (64 * SHARES) * 64; }
DEVICE Share share_of(int k, int share) {
    int size = share_size(k);
    return {min(share * size, k), min(share * size + size, k)};
}

// ---- staging -----------------------------------------------------------------------------------------------------

DEVICE int head_at(const Input& in, int k) { return (int)__fdividef(k + 0.5f, in.head_dim); }

// Sums of squares of value k's head; of four parts at once, or as many as there are.
DEVICE float4 head_parts(const Input& in, int row, int k) {
    const float* parts = in.head_squares + (row * head_at(in, in.k) + head_at(in, k)) * in.head_parts;
    if (in.head_parts == 4) return __ldcg((const float4*)parts);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int i = 0; i < in.head_parts; i++) sum.x += __ldcg(parts + i);
    return sum;
}

DEVICE float head_factor(const Input& in, const float4& parts) {
    return rsqrtf(__fdividef((parts.x + parts.y) + (parts.z + parts.w), in.head_dim) + in.epsilon);
}

struct NormWeight {
    float value[8];  // of the lane's first piece
    DEVICE void load(const Input& in, Share share) {
        int k = share.begin + (threadIdx.x & 31) * 8;
        if (in.norm_weight && k < share.end) load_eight(value, in.norm_weight + k);
    }
};

// The warp's share of all rows. With a norm in front, x * (1 + weight), and the squares of x: the row's factor is
// applied to the product.
DEVICE void stage(uint8_t* vectors, Staged& staged, const Input& in, const NormWeight& weight, int format) {
    constexpr int BATCH = 4;  // pieces under way together, of one row or of several
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, stride = vector_bytes(in.k);
    Share share = share_of(in.k, warp);
    int pieces = (share.end - share.begin + PIECE - 1) / PIECE, shift = pieces > 2 ? 2 : pieces > 1 ? 1 : 0;
    bool several = pieces > 1 || in.rows > 1, many = pieces * in.rows > 2;
    if (!pieces && lane < MAX_ROWS) staged.squares[lane][warp] = 0.f, staged.largest[warp][lane] = 0;
#pragma unroll 1
    for (int first = 0; first < in.rows; first += BATCH >> shift) {
        float x[BATCH][8];
#pragma unroll 1
        for (int turn = 0; turn < 2; turn++) {  // find the rows' scales, then write them
#pragma unroll 1
            for (int piece = 0; piece < pieces; piece += BATCH) {
                auto row_of = [&](int i) { return first + (i >> shift); };
                auto piece_of = [&](int i) { return piece + (i & ((1 << shift) - 1)); };
                auto at_of = [&](int i) { return share.begin + piece_of(i) * PIECE + lane * 8; };
                auto valid = [&](int i) { return row_of(i) < in.rows && piece_of(i) < pieces; };
                auto load = [&](int i) {
#pragma unroll
                    for (int j = 0; j < 8; j++) x[i][j] = 0.f;
                    if (valid(i) && at_of(i) < share.end)
                        load_eight(x[i], in.x + (int64_t)row_of(i) * in.x_stride + at_of(i));
                };
                float squares[BATCH];
                float4 parts[BATCH];
                uint32_t largest[BATCH];
                auto scale = [&](int i) {  // by the norm's weights or the heads' factors
                    squares[i] = 0.f, largest[i] = 0;
                    if (in.norm_weight) {
                        float other[8];
                        if (piece_of(i) && at_of(i) < share.end) load_eight(other, in.norm_weight + at_of(i));
#pragma unroll
                        for (int j = 0; j < 8; j++) {
                            squares[i] += x[i][j] * x[i][j];
                            x[i][j] *= 1.f + (piece_of(i) ? other[j] : weight.value[j]);
                        }
                    }
                    if (in.head_squares) {
                        float factor = head_factor(in, parts[i]);
#pragma unroll
                        for (int j = 0; j < 8; j++) x[i][j] *= factor;
                    }
#pragma unroll
                    for (int j = 0; j < 8; j++) largest[i] = max(largest[i], magnitude_bits(x[i][j]));
                };
                auto load_parts = [&](int i) {  // without a branch, which would wait for what it loads
                    parts[i] = head_parts(in, min(row_of(i), in.rows - 1), min(at_of(i), in.k - 1));
                };
                auto keep = [&](int i) {
                    if (!valid(i) || lane) return;
                    bool fresh = piece_of(i) == 0;
                    float& sum = staged.squares[row_of(i)][warp];
                    uint32_t& most = staged.largest[warp][row_of(i)];
                    sum = fresh ? squares[i] : sum + squares[i], most = fresh ? largest[i] : max(most, largest[i]);
                };
                auto write = [&](int i) {
                    if (!valid(i)) return;
                    float scale = scale_of(staged.largest[warp][row_of(i)], format);
                    if (at_of(i) < share.end)
                        split_eight(vectors + 2 * row_of(i) * stride + chunk_place(at_of(i) / 8), stride, x[i], scale,
                                    format);
                };
                if (turn == 0 || pieces > BATCH) {
                    load(0);
                    if (several) load(1);
                    if (many) load(2), load(3);
                    if (in.head_squares) {  // while the values are under way
                        load_parts(0);
                        if (several) load_parts(1);
                        if (many) load_parts(2), load_parts(3);
                    }
                    scale(0);
                    if (several) scale(1);
                    if (many) scale(2), scale(3);
                }
                if (turn == 0) {
                    if (in.norm_weight) squares[0] = warp_sum(squares[0]);
                    largest[0] = __reduce_max_sync(ALL_LANES, largest[0]);
                    if (several) {  // side by side
                        for (int i = 2; i < BATCH && !many; i++) squares[i] = 0.f, largest[i] = 0;
#pragma unroll
                        for (int offset = 16; in.norm_weight && offset; offset >>= 1)
#pragma unroll
                            for (int i = 1; i < BATCH; i++)
                                squares[i] += __shfl_xor_sync(ALL_LANES, squares[i], offset);
#pragma unroll
                        for (int i = 1; i < BATCH; i++) largest[i] = __reduce_max_sync(ALL_LANES, largest[i]);
                    }
                    keep(0);
                    if (several) keep(1);
                    if (many) keep(2), keep(3);
                } else {
                    write(0);
                    if (several) write(1);
                    if (many) write(2), write(3);
                }
            }
            __syncwarp();
        }
    }
}

DEVICE float rms_factor(const Staged& staged, const Input& in, int row) {
    if (!in.norm_weight) return 1.f;
    const float* s = staged.squares[row];
    float sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    return rsqrtf(__fdividef(sum, in.k) + in.epsilon);
}

// ---- tiles -------------------------------------------------------------------------------------------------------

// A warp's weights on their way: its share of the block's tiles, every `grid`-th from `first` on, in passes. A Work has
// a Place, of a tile: place(index); open(place, tile), which finds the tile; advance(place, tile), `grid` on.
template <typename Work>
struct Stream {
    const Work& work;
    uint8_t* slots;
    uint64_t policy;
    int format, depth, slot_size;
    int begin, end;  // of the warp's share, in bytes of a weight row
    int first, tiles, grid;
    int next, at;  // where to go on
    typename Work::Place place;
    Tile tile;

    DEVICE Stream(const Work& work, const Input& in, int format, int depth, int first, int grid, uint4* memory)
        : work(work), policy(evict_first()), format(format), depth(depth), first(first), grid(grid), next(first),
          place(work.place(first)) {
        Share share = share_of(in.k, threadIdx.x >> 5);
        slot_size = format == NVFP4 ? sizeof(Slot) : sizeof(Slot::codes);
        slots = (uint8_t*)memory + (threadIdx.x >> 5) * depth * slot_size;
        begin = at = bytes_of(share.begin, format), end = bytes_of(share.end, format);
    }
    DEVICE void start(int count) {
        tiles = count;
        if (begin >= end) next = tiles;
        if (next < tiles) work.open(place, tile);
#pragma unroll 1
        for (int slot = 0; slot < depth; slot++) put(slot);
    }
    DEVICE Slot& at_slot(int slot) const { return *(Slot*)(slots + slot * slot_size); }
    DEVICE void put(int slot) {
        if (next < tiles) {
            fetch(at_slot(slot), tile, at, end, format, policy);
            at += PASS;
            if (at >= end) {
                at = begin, next += grid;
                if (next < tiles) work.advance(place, tile);
            }
        }
        copy_commit();
    }
};

// Multiplies the block's tiles. A Work also has
//   prepare(index): what finish will need of weights; ask(prepared): of what the previous kernel wrote;
//   finish(prepared, staged, value): value[set][half] belongs to row 4 set + t and the tile's row g + 8 half.
// Warps finish a tile each, eight at a time. prepared: of the warp's first. exchange: [tile, share, row, TILE] floats,
// for eight tiles or as many as there are. Needs all shares staged, and a barrier between.
template <int SETS, typename Work>
DEVICE void multiply_tiles(const Input& in, Stream<Work>& stream, const Work& work, typename Work::Prepared prepared,
                           const uint8_t* vectors, const Staged& staged, float* exchange) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, columns[SETS], slot = 0;
    float unscale[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        int row = s * SET_ROWS + (lane >> 3);
        columns[s] = (2 * (row < in.rows ? row : 0) + (lane >> 2 & 1)) * vector_bytes(in.k);
        unscale[s] = unscale_of(staged.largest[warp][s * SET_ROWS + t], stream.format);
    }
#pragma unroll 1
    for (int index = stream.first; index < stream.tiles;) {
        int mine = index + warp * stream.grid;
#pragma unroll 1
        for (int member = 0; member < WARPS && index < stream.tiles; member++, index += stream.grid) {
            Sums<SETS> sums;
            sums.clear();
#pragma unroll 1
            for (int at = stream.begin; at < stream.end; at += PASS) {
                wait_for_pass(stream.depth);
                multiply<SETS>(sums, stream.at_slot(slot), stream.format, at, stream.begin, stream.end, vectors, columns);
                __syncwarp();
                stream.put(slot);
                slot = slot + 1 == stream.depth ? 0 : slot + 1;
            }
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                int row = s * SET_ROWS + t;
                float* out = exchange + ((member * SHARES + warp) * in.rows + row) * TILE + g;
                float low = sums.total(s, 0) * unscale[s], high = sums.total(s, 1) * unscale[s];
                if (row < in.rows) out[0] = low, out[8] = high;
            }
        }
        __syncthreads();
        if (mine < stream.tiles) {
            float value[2 * SETS];
#pragma unroll
            for (int i = 0; i < 2 * SETS; i++) {
                int row = min(i / 2 * SET_ROWS + t, in.rows - 1);
                const float* from = exchange + (warp * SHARES * in.rows + row) * TILE + g + i % 2 * 8;
                float v[SHARES];
#pragma unroll
                for (int w = 0; w < SHARES; w++) v[w] = from[w * in.rows * TILE];
                value[i] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
            }
            work.finish(prepared, staged, value);
        }
        if (index >= stream.tiles) break;
        mine += WARPS * stream.grid;
        if (mine < stream.tiles) {
            prepared = work.prepare(mine);
            work.ask(prepared);
        }
        __syncthreads();
    }
}

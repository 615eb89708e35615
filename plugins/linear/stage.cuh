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
constexpr int CLAIM = 4;    // tiles of a group that a block claims
constexpr int PACE = 2;     // passes asked for together at first: more would delay what this and other kernels load
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

constexpr int MAX_HEADS = 64;  // of head_squares
struct Staged {
    float squares[MAX_ROWS][SHARES];  // sums of squares of the shares
    uint32_t largest[SHARES][MAX_ROWS];
    float factors[MAX_ROWS * MAX_HEADS];
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

struct NormWeight {
    float value[8];  // 1 + weight, of the lane's first piece
    DEVICE void load(const Input& in, Share share) {
        if (in.norm_weight) load_norm(value, in, share.begin + (threadIdx.x & 31) * 8);
    }
    DEVICE static void load_norm(float (&value)[8], const Input& in, int k) {
        load_eight(value, in.norm_weight + min(k, in.k - 8));
#pragma unroll
        for (int j = 0; j < 8; j++) value[j] += 1.f;
    }
};

// One over the root mean square of every head of every row, for the whole block.
DEVICE void find_head_factors(float* factors, const Input& in) {
    int heads = in.k / in.head_dim;
#pragma unroll 1
    for (int i = threadIdx.x; i < in.rows * heads; i += THREADS) {
        const float* parts = in.head_squares + i * in.head_parts;
        float sum = 0.f;
        if (in.head_parts == 4) {
            float4 p = __ldcg((const float4*)parts);
            sum = (p.x + p.y) + (p.z + p.w);
        } else {
#pragma unroll 1
            for (int j = 0; j < in.head_parts; j++) sum += __ldcg(parts + j);
        }
        factors[i] = rsqrtf(__fdividef(sum, in.head_dim) + in.epsilon);
    }
    __syncthreads();
}

// Which two pieces of its share a warp stages together: of `row` and the next one, which past the last is that one once
// more, or, with `pair`, both of `row`. For shares of more pieces `scan` is 1, then 2: find the scale, from one pair of
// pieces to the next; split by it.
struct Turn {
    int row, piece, scan;
    bool pair;
    DEVICE void advance(int pieces) {
        piece += 2;
        if (piece < pieces) return;
        piece = 0;
        if (scan == 1) scan = 2;
        else row += pair ? 1 : 2, scan = pieces > 2 ? 1 : 0;
    }
    DEVICE int row_of(int i, const Input& in) const { return pair ? row : min(row + i, in.rows - 1); }
    DEVICE int place_of(int i, Share share) const {
        return share.begin + (piece + (pair ? i : 0)) * PIECE + (threadIdx.x & 31) * 8;
    }
    DEVICE void load(float (&x)[2][8], const Input& in, Share share) const {
#pragma unroll
        for (int i = 0; i < 2; i++)
            load_eight(x[i], in.x + (int64_t)row_of(i, in) * in.x_stride + min(place_of(i, share), in.k - 8));
    }
};

// With hardly a branch, as this is between a kernel's start and its products, and once: what all kernels of a layer
// execute is to stay in the instruction cache. With a norm in front, x * (1 + weight), and the squares of x: the row's
// factor is applied to the product.
DEVICE void stage_pieces(uint8_t* vectors, Staged& staged, const Input& in, Share share, const NormWeight& weight,
                         int format, const Turn& turn, float (&x)[2][8]) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, stride = vector_bytes(in.k);
    int first = turn.row, piece = turn.piece, scan = turn.scan;
    bool pair = turn.pair, ragged = (piece + 1 + pair) * PIECE > share.end - share.begin;
    float squares[2];
    uint32_t largest[2];
    int row[2], at[2];
#pragma unroll
    for (int i = 0; i < 2; i++) row[i] = turn.row_of(i, in), at[i] = turn.place_of(i, share);
    if (in.head_squares && first == 0 && piece == 0 && scan != 2) find_head_factors(staged.factors, in);
    if (ragged) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (at[i / 8] >= share.end) x[i / 8][i % 8] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) squares[i] = 0.f;
    if (in.norm_weight) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float other[8];
#pragma unroll
            for (int j = 0; j < 8; j++) other[j] = weight.value[j];
            if (at[i] - lane * 8 > share.begin) NormWeight::load_norm(other, in, at[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) squares[i] += x[i][j] * x[i][j], x[i][j] *= other[j];
        }
#pragma unroll
        for (int offset = 16; offset; offset >>= 1)
#pragma unroll
            for (int i = 0; i < 2; i++) squares[i] += __shfl_xor_sync(ALL_LANES, squares[i], offset);
    }
    if (in.head_squares) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int k = min(at[i], in.k - 1);
            float factor = staged.factors[(int)__fdividef(row[i] * in.k + k + 0.5f, in.head_dim)];
#pragma unroll
            for (int j = 0; j < 8; j++) x[i][j] *= factor;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(x[i][j]));
        largest[i] = __reduce_max_sync(ALL_LANES, __float_as_uint(most));
    }
    if (pair) {  // of one row, whose scale they share
        squares[0] += squares[1];
        largest[0] = max(largest[0], largest[1]);
        if (scan && (scan == 2 || piece)) {
            squares[0] = scan == 2 ? staged.squares[first][warp] : staged.squares[first][warp] + squares[0];
            largest[0] = max(largest[0], staged.largest[warp][first]);
            __syncwarp();
        }
        squares[1] = squares[0], largest[1] = largest[0];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (lane == 0) staged.squares[row[i]][warp] = squares[i], staged.largest[warp][row[i]] = largest[i];
        bool again = i && !pair && row[1] == row[0];
        if (scan == 1 || again || (ragged && at[i] >= share.end)) continue;
        split_eight(vectors + 2 * row[i] * stride + chunk_place(at[i] / 8), stride, x[i], scale_of(largest[i], format),
                    format);
    }
}

// The warp's share of all rows; what is next is on its way meanwhile.
DEVICE void stage(uint8_t* vectors, Staged& staged, const Input& in, const NormWeight& weight, int format) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Share share = share_of(in.k, warp);
    int pieces = (share.end - share.begin + PIECE - 1) / PIECE;
    if (!pieces) {
        if (in.head_squares) find_head_factors(staged.factors, in);
        if (lane < MAX_ROWS) staged.squares[lane][warp] = 0.f, staged.largest[warp][lane] = 0;
        return;
    }
    Turn turn = {0, 0, pieces > 2 ? 1 : 0, pieces > 1};
    float x[2][8];
    turn.load(x, in, share);
#pragma unroll 1
    while (turn.row < in.rows) {
        Turn next = turn;
        float following[2][8];
        next.advance(pieces);
        if (next.row < in.rows) next.load(following, in, share);
        stage_pieces(vectors, staged, in, share, weight, format, turn, x);
        __syncwarp();
        turn = next;
#pragma unroll
        for (int i = 0; i < 16; i++) x[i / 8][i % 8] = following[i / 8][i % 8];
    }
}

DEVICE float rms_factor(const Staged& staged, const Input& in, int row) {
    if (!in.norm_weight) return 1.f;
    const float* s = staged.squares[row];
    float sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    return rsqrtf(__fdividef(sum, in.k) + in.epsilon);
}

// ---- tiles -------------------------------------------------------------------------------------------------------

// Which tiles are a block's: every `grid`-th from `first` on; or, with CLAIMED, groups of CLAIM as blocks get to them,
// where so much is read that the faster blocks would long be done. The first two groups are the block's own.
struct Claims {
    uint32_t* counter;  // zero before the launch
    int* base;          // shared: [2], the first tile of group number 2i, 2i + 1
};

// A warp's weights on their way: its share of the block's tiles, in passes. A Work has a Place, of a tile: place(index);
// open(place, tile), which finds the tile; advance(place, tile, any), `grid` on, where past the last one (any is false)
// it may find anything.
template <typename Work, bool CLAIMED>
struct Stream {
    const Work& work;
    uint8_t* slots;
    uint64_t policy;
    int depth, slot_size;
    int begin, end;  // of the warp's share, in bytes of a weight row
    int first, tiles, grid;
    int next, at;  // of the last pass asked for
    const Claims claims;
    int member, group;
    typename Work::Place place;
    Tile tile;

    DEVICE Stream(const Work& work, const Input& in, int format, int depth, int first, int grid, const Claims& claims,
                  uint4* memory)
        : work(work), policy(evict_first()), depth(depth), first(first), grid(grid), next(first), claims(claims),
          member(0), group(0), place(work.place(first)) {
        Share share = share_of(in.k, threadIdx.x >> 5);
        slot_size = format == NVFP4 ? sizeof(Slot) : sizeof(Slot::codes);
        slots = (uint8_t*)memory + (threadIdx.x >> 5) * depth * slot_size;
        begin = at = bytes_of(share.begin, format), end = bytes_of(share.end, format);
    }
    DEVICE void start(int count, int format) {
        tiles = count;
        if (begin >= end) next = tiles;
        if (next < tiles) work.open(place, tile);
#pragma unroll 1
        for (int slot = 0; slot < depth; slot++) {
            if (slot) advance();
            if (slot >= PACE) copy_wait<PACE - 1>();
            put(slot, format);
        }
    }
    DEVICE Slot& at_slot(int slot) const { return *(Slot*)(slots + slot * slot_size); }
    DEVICE void advance() {
        at += PASS;
        if (at < end) return;
        at = begin;
        if (CLAIMED && ++member == CLAIM) {
            member = 0, next = claims.base[++group % 2], place = work.place(next);
            if (next < tiles) work.open(place, tile);
            return;
        }
        next += grid;
        work.advance(place, tile, next < tiles);
    }
    DEVICE void put(int slot, int format) {
        if (next < tiles) fetch(at_slot(slot), tile, at, end, format, policy);
        copy_commit();
    }
};

// Multiplies up to eight of the block's tiles, from `index` on, into `exchange`.
template <int SETS, int FORMAT, typename Work, bool CLAIMED>
DEVICE void multiply_group(int index, int& slot, int rows, Stream<Work, CLAIMED>& stream, const uint8_t* vectors,
                           const int (&columns)[SETS], const float (&unscale)[SETS], float* exchange) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll 1
    for (int member = 0; member < (CLAIMED ? CLAIM : WARPS) && index < stream.tiles; member++, index += stream.grid) {
        Sums<SETS> sums;
        sums.clear();
#pragma unroll 1
        for (int at = stream.begin; at < stream.end; at += PASS) {
            wait_for_pass(stream.depth);
            if (index == stream.first && at == stream.begin) mark(ARRIVED);
            stream.advance();
            multiply_pass<SETS, FORMAT>(sums, stream.at_slot(slot), at, stream.begin, stream.end, vectors, columns);
            __syncwarp();
            stream.put(slot, FORMAT);
            slot = slot + 1 == stream.depth ? 0 : slot + 1;
        }
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            int row = s * SET_ROWS + t;
            float* out = exchange + ((member * SHARES + warp) * rows + row) * TILE + g;
            float low = sums.total(s, 0) * unscale[s], high = sums.total(s, 1) * unscale[s];
            if (row < rows) out[0] = low, out[8] = high;
        }
    }
}

// Multiplies the block's tiles. A Work also has
//   prepare(index): what finish will need;
//   finish(prepared, staged, value): value[set][half] belongs to row 4 set + t and the tile's row g + 8 half.
// Warps finish a tile each, eight (CLAIMED: CLAIM) at a time. exchange: [tile, share, row, TILE] floats, for so many tiles
// or as many as there are. Called with the rows staged.
template <int SETS, typename Work, bool CLAIMED>
DEVICE void multiply_tiles(const Input& in, Stream<Work, CLAIMED>& stream, const Work& work, int format,
                           const uint8_t* vectors, const Staged& staged, float* exchange) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, columns[SETS], slot = 0;
    int* base = stream.claims.base;
    int ahead = 0;  // of thread 0: the first tile of the group after the next
    float unscale[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        int row = s * SET_ROWS + (lane >> 3);
        columns[s] = (2 * (row < in.rows ? row : 0) + (lane >> 2 & 1)) * vector_bytes(in.k);
    }
#pragma unroll 1
    for (int index = stream.first, following, group = 0; index < stream.tiles; index = following, group++) {
        int mine = !CLAIMED || warp < CLAIM ? index + warp * stream.grid : stream.tiles;
        typename Work::Prepared prepared = {};
        if (mine < stream.tiles) prepared = work.prepare(mine);
        bool claiming = CLAIMED && threadIdx.x == 0;
        if (claiming) base[(group + 1) % 2] = group ? ahead : index + CLAIM * gridDim.x;
        __syncthreads();
        if (claiming) ahead = CLAIM * (2 * gridDim.x + atomicAdd(stream.claims.counter, 1u));
        following = CLAIMED ? base[(group + 1) % 2] : index + WARPS * stream.grid;
#pragma unroll
        for (int s = 0; s < SETS; s++) unscale[s] = unscale_of(staged.largest[warp][s * SET_ROWS + t], format);
        with_format(format, [&](auto constant) {
            multiply_group<SETS, constant.value>(index, slot, in.rows, stream, vectors, columns, unscale, exchange);
        });
        mark(MULTIPLIED);
        __syncthreads();
        if (mine >= stream.tiles) continue;
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
}

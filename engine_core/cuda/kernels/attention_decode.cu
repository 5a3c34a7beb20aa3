// Attention of one new token, or with BATCHED of one of each of several sequences, over the linear KV cache. SPLITS CTAs divide the
// keys of a KV head (flash decoding: Dao et al. 2023) with an online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867); tensor
// cores multiply, with the query heads of the KV head as columns. The kernel also rotates q and k and writes the new K and V in
// place. The last CTA of a KV head to finish merges the splits.
//
// qkv: [(HEADS + 2 KV_HEADS) HEAD_DIM]; cache: this layer's [2][KV_HEADS][CONTEXT][HEAD_DIM], quantized with KV_INT8, and then
// scales: fp16 [2][KV_HEADS][SCALE_PITCH] (kv_int8.cuh); rope: [CONTEXT][ROTATED / 2] (cos, sin), more rows with LONG_ROPE (rope.cuh); partial: float32 [SPLITS][BUNDLES]
// [GROUP][HEAD_DIM], then as many Merges; counters: uint32 [BUNDLES], 0 between launches; output: [HEADS][HEAD_DIM]. Grid: BUNDLES *
// SPLITS or more. The position decides how many splits work; a split has at least MIN_KEYS keys. BUNDLES is KV_HEADS or, where more
// than 8 query heads share one, a multiple of it: the CTAs of each bundle have GROUP query heads, and all of them write the new K and V.
//
// BATCHED: the grid's second dimension is the sequence, and every array but rope and the norms' weights has one more dimension in
// front: qkv, output, partial, counters and state by sequence, cache and scales by KV slot (SLOT_STRIDE). slots: int32 [sequences],
// the slot of each one, negative = nothing to do. Each sequence has its own position.
//
// APPENDED: the rows are tokens that follow each other in one slot, and rope_append has put all their K and V into the cache: the
// kernel waits for it before it reads the cache, and writes nothing there.
//
// The ring (kv_ring.cuh) is filled before the kernel waits for the kernel that computes qkv: the position and the cache before it
// changed a step ago, and the first kernel of a step starts after the last one of the step before has ended. The new token's K and
// V are put among the copied ones as the cache will give them back.
//
// Both matrix multiplications have the heads as columns (heads past GROUP are zeros) and as rows keys, then elements. The order of the
// dimension that is summed over is free as long as both operands have the same: lane 4 g + t takes chunks t, t + 4, … of 8 elements
// of q and of the keys g and g + 8, chunks g, g + 8, … of the values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
#include "mma.cuh"
#include "scores.cuh"

#ifndef BATCHED
#define BATCHED 0
#endif
#ifndef APPENDED
#define APPENDED 0
#endif
#ifndef BUNDLES
#define BUNDLES KV_HEADS
#endif
constexpr int GROUP = HEADS / BUNDLES;  // query heads of a CTA
#include "kv_ring.cuh"

constexpr int SHARE_GRAIN = KV_INT8 ? 8 : 1;   // a share begins at a group of scales
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = HEAD_DIM / 8;
constexpr int QUARTETS = (CHUNKS + 3) / 4;     // of chunks, one for each t
constexpr int OCTETS = (CHUNKS + 7) / 8;       // of chunks, one for each g
constexpr int VALUES = GROUP * HEAD_DIM;
constexpr float LOWEST = -1e30f;               // stands for -infinity without its NaNs
static_assert(GROUP <= 8 && HEADS % BUNDLES == 0 && BUNDLES % KV_HEADS == 0, "unsupported shape");

struct Merge {  // running maximum (base 2) and sum of one query head
    float peak, sum;
};

struct NewToken {  // its K and V as the cache has them
    alignas(16) item_t rows[2][HEAD_DIM];
    half_t scales[2];
};

// Rotates the query heads into ``queries`` and, if this CTA ``has_new``, takes the new token's K and V into cache and ``fresh``.
__device__ __forceinline__ void prepare(half_t (*queries)[HEAD_DIM], NewToken& fresh, const half_t* qkv, const half_t* q_norm,
                                        const half_t* k_norm, const Angles& angles, int bundle, bool has_new, const Ring& ring,
                                        int position) {
    const int lane = threadIdx.x % 32, part = lane % LANES_PER_HEAD, d = 8 * part;
    const int kv_head = bundle / (BUNDLES / KV_HEADS);
    const bool writes = lane < LANES_PER_HEAD && d < HEAD_DIM;
    for (int v = threadIdx.x / 32; v < GROUP + has_new; v += WARPS) {
        const bool is_query = v < GROUP;
        HeadVector raw;
        raw.load(qkv + (is_query ? bundle * GROUP + v : HEADS + kv_head) * HEAD_DIM, part);
        uint4 value = make_uint4(0, 0, 0, 0);
        if (!is_query && d < HEAD_DIM) value = load16(qkv + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + d);
        float x[8];
        raw.rotate(x, is_query ? q_norm : k_norm, angles, part);
        if (is_query) {
            if (writes) *(uint4*)(queries[v] + d) = pack8(x);
            continue;
        }
#if KV_INT8
        float y[8];
        unpack8(value, y);
        half_t bits[2];
        const Piece pieces[2] = {quantize<LANES_PER_HEAD>(x, bits[0]), quantize<LANES_PER_HEAD>(y, bits[1])};
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) ring.scales[i][position] = fresh.scales[i] = bits[i];
        }
#else
        const Piece pieces[2] = {pack8(x), value};
#endif
        if (writes) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                *(Piece*)(fresh.rows[i] + d) = pieces[i];
                *(Piece*)(ring.cached[i] + (u64)position * HEAD_DIM + d) = pieces[i];
            }
        }
    }
}

// The new token's row of a piece of K or V, ``row`` keys into it, is not in the cache yet.
__device__ __forceinline__ void insert(char* piece, int row, const NewToken& fresh, int which) {
    const int lane = threadIdx.x % 32;
    if (lane < CHUNKS) *(Piece*)chunk(piece, row, lane) = *(const Piece*)(fresh.rows[which] + 8 * lane);
#if KV_INT8
    if (lane == 0) ((half_t*)(piece + SCALES))[row] = fresh.scales[which];
#endif
    __syncwarp();
}

// An 8 × 8 matrix of 16 bits, two columns to a register, transposed.
__device__ __forceinline__ u32 transpose(u32 v) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
    return v;
}

struct Running {  // online softmax of a warp's keys for heads 2 t and 2 t + 1
    float acc[OCTETS][4][4], peak[2], sum[2];  // acc[j][q]: of chunk 8 j + g elements 2 q (both heads) and 2 q + 1

    // scores: of keys g (both heads) and g + 8, base 2; LOWEST = not there. They become weights, relative to a peak that
    // moves only when one of them is SLACK above it: 16 bits hold that.
    __device__ __forceinline__ void weigh(float (&scores)[4]) {
        constexpr float SLACK = KV_INT8 ? 4.f : 8.f;  // a weight is multiplied by a scale of up to 516, of fp8 up to 2340
        float top[2] = {fmaxf(scores[0], scores[2]), fmaxf(scores[1], scores[3])};
        if (__any_sync(0xffffffffu, top[0] > peak[0] + SLACK || top[1] > peak[1] + SLACK)) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], offset));
                top[h] = fmaxf(top[h], peak[h]);
                const float shrink = exp2f(peak[h] - top[h]);
                peak[h] = top[h];
                sum[h] *= shrink;
#pragma unroll
                for (int j = 0; j < OCTETS; ++j)
#pragma unroll
                    for (int q = 0; q < 4; ++q) acc[j][q][h] *= shrink, acc[j][q][h + 2] *= shrink;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[i] = scores[i] == LOWEST ? 0.f : exp2f(scores[i] - peak[i % 2]);
            sum[i % 2] += scores[i];
        }
    }

    // Adds the weighted rows of V.
    __device__ __forceinline__ void add(const float (&weights)[4], char* piece, int g, int t) {
        const u32 low = transpose(pack2(weights[0], weights[1])), high = transpose(pack2(weights[2], weights[3]));
#pragma unroll
        for (int j = 0; j < OCTETS; ++j) {
            u32 words[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 v = read_chunk(piece, 2 * t + i % 2 + i / 2 * 8, 8 * j + g);
                words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
            }
#pragma unroll
            for (int q = 0; q < 4; ++q)  // element 2 q or 2 q + 1 of two keys side by side
                multiply(acc[j][q], __byte_perm(words[0][q], words[1][q], 0x5410), __byte_perm(words[0][q], words[1][q], 0x7632),
                         __byte_perm(words[2][q], words[3][q], 0x5410), __byte_perm(words[2][q], words[3][q], 0x7632), low, high);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM > 128 ? 1 : 2)  // leaves registers for the next kernel
    attention_decode(const half_t* qkv, item_t* cache, const float2* rope, const half_t* q_norm, const half_t* k_norm,
                     const State* state, float* partial, u32* counters, half_t* output, half_t* scales,
                     const int* slots PLACES_PARAMETER ROPE_PARAMETERS) {
    extern __shared__ uint4 shared[];  // the rings; afterwards the warps' values to be merged
    __shared__ alignas(16) half_t queries[GROUP][HEAD_DIM];
    __shared__ NewToken fresh;
    __shared__ Merge merges[WARPS][GROUP], all_merges[SPLITS][GROUP];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int bundle = blockIdx.x % BUNDLES, split = blockIdx.x / BUNDLES, kv_head = bundle / (BUNDLES / KV_HEADS);

    let_next_start();
#if BATCHED
    state += blockIdx.y;
    const int slot = (int)load4(slots + blockIdx.y);
#else
    constexpr int slot = 0;
#endif
    const int position = (int)load4(&state->position);
    // The first key that the token sees, and the one that the shares begin at.
    const int oldest = WINDOW > 0 ? max(0, position + 1 - WINDOW) : 0, base = oldest / SHARE_GRAIN * SHARE_GRAIN;
    const int length = position + 1 - base;
    const int share = max(MIN_KEYS, (length + SPLITS * SHARE_GRAIN - 1) / (SPLITS * SHARE_GRAIN) * SHARE_GRAIN);
    const int active = (length + share - 1) / share;
    // A step queued past the end writes nothing. Leaving counts as an end: wait first, as every kernel does.
    if (position >= CONTEXT || split >= active || slot < 0) {
        wait_for_previous();
        return;
    }
#if BATCHED
    qkv += (u64)blockIdx.y * (HEADS + 2 * KV_HEADS) * HEAD_DIM, output += (u64)blockIdx.y * HEADS * HEAD_DIM;
    partial += (u64)blockIdx.y * SPLITS * HEADS * (HEAD_DIM + 2), counters += blockIdx.y * BUNDLES;
    cache += slot * (u64)SLOT_STRIDE;
    if (KV_INT8) scales += slot * (u64)SCALE_SLOT_STRIDE;
#endif
#if ORDERED
    for (int i = 8 * threadIdx.x; i < VALUES; i += 8 * THREADS) prefetch(places + bundle * VALUES + i);
#endif
    const int begin = base + split * share, end = min(position + 1, begin + share);
    const bool has_new = !APPENDED && split == active - 1;  // this share ends with the new token
    Ring ring;
    ring.pieces = (char*)shared + warp * DEPTH * PIECE_BYTES;
    ring.cached[0] = cache + (u64)kv_head * CONTEXT * HEAD_DIM, ring.cached[1] = ring.cached[0] + (u64)KV_HEADS * CONTEXT * HEAD_DIM;
#if KV_INT8
    ring.scales[0] = scales + kv_head * SCALE_PITCH, ring.scales[1] = ring.scales[0] + KV_HEADS * SCALE_PITCH;
#endif
    ring.first = begin + warp * TILE, ring.end = APPENDED ? end : min(position, end);
    if (APPENDED) wait_for_previous();
#pragma unroll
    for (int number = 0; number < DEPTH; ++number) ring.load(number, number);
    Angles angles;
    angles.load(rope + (u64)(ROPE_ROW(slot) + position) * (ROTATED / 2), lane % LANES_PER_HEAD);

    if (!APPENDED) wait_for_previous();
    prepare(queries, fresh, qkv, q_norm, k_norm, angles, bundle, has_new, ring, position);
    __syncthreads();
    uint4 q[QUARTETS];
#pragma unroll
    for (int i = 0; i < QUARTETS; ++i)
        q[i] = g < GROUP && 4 * i + t < CHUNKS ? *(const uint4*)(queries[g] + 8 * (4 * i + t)) : make_uint4(0, 0, 0, 0);

    Running run = {};
    run.peak[0] = run.peak[1] = LOWEST;
    int number = 0, place = 0;  // the next piece, and where it lies in the ring
    auto arrived = [&](int fresh_row) {  // the next piece
        wait_copies<DEPTH - 1>();
        __syncwarp();
        char* piece = ring.pieces + place * PIECE_BYTES;
        if (fresh_row < TILE) insert(piece, fresh_row, fresh, number % 2);
        return piece;
    };
    auto release = [&]() {  // it is read: its place is for another
        __syncwarp();
        ring.load(place, number + DEPTH);
        ++number;
        place = place + 1 == DEPTH ? 0 : place + 1;
    };
    for (int key = ring.first; key < end; key += TILE * WARPS) {
        const int fresh_row = has_new ? position - key : TILE;  // where the new token's row is, if it is in this tile
        char* piece = arrived(fresh_row);
        float sums[2][4] = {};
#pragma unroll
        for (int i = 0; i < QUARTETS; ++i) {
            const uint4 a = read_chunk(piece, g, 4 * i + t), b = read_chunk(piece, g + 8, 4 * i + t);
            multiply(sums[0], a.x, b.x, a.y, b.y, q[i].x, q[i].y);
            multiply(sums[1], a.z, b.z, a.w, b.w, q[i].z, q[i].w);
        }
        float scores[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float score = (sums[0][i] + sums[1][i]) * SCORE_SCALE;
#if KV_INT8
            score *= read_scale(piece, g + i / 2 * 8);
#endif
            if (CAPPED) score = soft_capped(score);
            const int its_key = key + g + i / 2 * 8;
            scores[i] = its_key < end && (WINDOW == 0 || its_key >= oldest) ? score : LOWEST;
        }
        release();

        run.weigh(scores);
        piece = arrived(fresh_row);
#if KV_INT8
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (scores[i] != 0.f) scores[i] *= read_scale(piece, g + i / 2 * 8);  // where no key is, anything may lie
#endif
        run.add(scores, piece, g, t);
        release();
    }
    wait_copies<0>();
    __syncthreads();  // the rings are free

    float(*values)[GROUP][HEAD_DIM] = (float(*)[GROUP][HEAD_DIM])shared;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int head = 2 * t + h;
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) run.sum[h] += __shfl_xor_sync(0xffffffffu, run.sum[h], offset);
        if (head >= GROUP) continue;
#pragma unroll
        for (int j = 0; j < OCTETS; ++j) {
            if (8 * j + g >= CHUNKS) continue;
            float4* target = (float4*)(values[warp][head] + 8 * (8 * j + g));
            const auto& acc = run.acc[j];
            target[0] = make_float4(acc[0][h], acc[0][h + 2], acc[1][h], acc[1][h + 2]);
            target[1] = make_float4(acc[2][h], acc[2][h + 2], acc[3][h], acc[3][h + 2]);
        }
        if (g == 0) merges[warp][head] = {run.peak[h], run.sum[h]};
    }
    __syncthreads();

    // Two elements a thread: of the warps, then, in the CTA that comes last, of the splits.
    Merge* partial_merges = (Merge*)(partial + (u64)SPLITS * BUNDLES * VALUES);
    const u64 own = (u64)split * BUNDLES + bundle;
    for (int i = 2 * threadIdx.x; i < VALUES; i += 2 * THREADS) {
        const int head = i / HEAD_DIM;
        float top = LOWEST, total = 0.f;
        float2 value = make_float2(0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, merges[w][head].peak);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2f(merges[w][head].peak - top);
            const float2 v = *(const float2*)(values[w][head] + i % HEAD_DIM);
            total += weight * merges[w][head].sum;
            value.x += weight * v.x, value.y += weight * v.y;
        }
        if (active == 1) {
            STORE_PAIR(output, bundle * VALUES + i, pack2(value.x / total, value.y / total));
        } else {
            *(float2*)(partial + own * VALUES + i) = value;
            if (i % HEAD_DIM == 0) partial_merges[own * GROUP + head] = {top, total};
        }
    }
    if (active == 1 || !is_last_to_arrive(counters + bundle, active)) return;
    for (int i = threadIdx.x; i < active * GROUP; i += THREADS) {
        const uint2 merge = load8(partial_merges + ((u64)(i / GROUP) * BUNDLES + bundle) * GROUP + i % GROUP);
        all_merges[i / GROUP][i % GROUP] = {__uint_as_float(merge.x), __uint_as_float(merge.y)};
    }
    __syncthreads();
    for (int i = 2 * threadIdx.x; i < VALUES; i += 2 * THREADS) {
        const int head = i / HEAD_DIM;
        const float* source = partial + (u64)bundle * VALUES + i;
        float top = LOWEST, total = 0.f;
        float2 value = make_float2(0.f, 0.f);
        for (int s = 0; s < active; ++s) top = fmaxf(top, all_merges[s][head].peak);
        constexpr int BATCH = 8;  // loads in flight
        for (int first = 0; first < active; first += BATCH) {
            uint2 v[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) v[b] = load8(source + (u64)min(first + b, active - 1) * BUNDLES * VALUES);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                if (first + b >= active) break;
                const float weight = exp2f(all_merges[first + b][head].peak - top);
                total += weight * all_merges[first + b][head].sum;
                value.x += weight * __uint_as_float(v[b].x), value.y += weight * __uint_as_float(v[b].y);
            }
        }
        STORE_PAIR(output, bundle * VALUES + i, pack2(value.x / total, value.y / total));
    }
}

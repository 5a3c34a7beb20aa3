// Attention of one new token over the linear KV cache, split over the sequence (flash decoding: Dao et al. 2023) with an
// online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867). Rotates q and k, writes the new K and V in place, and the
// last CTA of a KV head to finish merges the splits.
//
// qkv: [(HEADS + 2 KV_HEADS) HEAD_DIM]; cache: this layer's [2][KV_HEADS][CONTEXT][HEAD_DIM], with KV_INT8 in levels, and
// scales: fp16 [2][KV_HEADS][SCALE_PITCH] (kv_int8.cuh); rope: [CONTEXT][HEAD_DIM / 2] (cos, sin); partial: float32
// [SPLITS][KV_HEADS][GROUP][HEAD_DIM + 2]; counters: uint32 [KV_HEADS], 0 between launches; output: [HEADS][HEAD_DIM]. Grid:
// KV_HEADS * SPLITS or more, one CTA per multiprocessor; how many splits work is decided by the position.
//
// The ring (kv_ring.cuh) is filled before the kernel waits for the one that computes qkv: the position and the cache before
// it changed a step ago, and the first kernel of a step starts after the last one of the step before has ended. The new
// token's K and V take part as the cache will give them back, without passing through memory.
#include "common.cuh"

constexpr int GROUP = HEADS / KV_HEADS;  // query heads of a KV head
constexpr int WARPS = GROUP * HEAD_DIM > 1024 ? 4 : 8, THREADS = 32 * WARPS;
#include "kv_ring.cuh"

constexpr int MIN_KEYS = 256;          // of a split; with fewer, merging takes longer than reading them
constexpr int SHARE_GRAIN = KV_INT8 ? 8 : 1;  // a share begins at a group of scales
constexpr float LOWEST = -1e30f;       // stands for -infinity without its NaNs

struct Merge {  // running maximum (base 2) and sum of one query head
    float peak, sum;
};

struct Running {  // online softmax of this lane's slot
    float acc[GROUP][8], peak[GROUP], sum[GROUP];

    template <int KEYS>  // scores: base 2, LOWEST = not there
    __device__ __forceinline__ void add(float scores[KEYS][GROUP], const Piece* values, const float* scales) {
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float top = peak[g];
#pragma unroll
            for (int u = 0; u < KEYS; ++u) top = fmaxf(top, scores[u][g]);
            const float shrink = exp2f(peak[g] - top);
            peak[g] = top;
            sum[g] *= shrink;
#pragma unroll
            for (int j = 0; j < 8; ++j) acc[g][j] *= shrink;
#pragma unroll
            for (int u = 0; u < KEYS; ++u) {
                scores[u][g] = scores[u][g] == LOWEST ? 0.f : exp2f(scores[u][g] - top);
                sum[g] += scores[u][g];
            }
        }
#pragma unroll
        for (int u = 0; u < KEYS; ++u) {
            float f[8];
            unpack_piece(values[u], f);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                const float weight = KV_INT8 ? scores[u][g] * scales[u] : scores[u][g];
#pragma unroll
                for (int j = 0; j < 8; ++j) acc[g][j] += weight * f[j];
            }
        }
    }
};

__device__ __forceinline__ float dot8(const float* a, const float* b) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += a[j] * b[j];
    return group_sum<LANES_PER_HEAD>(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_decode(const half_t* qkv, item_t* cache, const float2* rope, const half_t* q_norm, const half_t* k_norm,
                     const State* state, float* partial, u32* counters, half_t* output, half_t* scales) {
    extern __shared__ uint4 shared[];  // the ring; afterwards the warps' values to be merged
    __shared__ Merge merges[WARPS][GROUP];
    __shared__ bool is_last;
    float(*values)[GROUP][HEAD_DIM] = (float(*)[GROUP][HEAD_DIM])shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int kv_head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS;
    const int slot = lane / LANES_PER_HEAD, part = lane % LANES_PER_HEAD, d = 8 * part;
    item_t* keys = cache + (u64)kv_head * CONTEXT * HEAD_DIM;
    item_t* vals = keys + (u64)KV_HEADS * CONTEXT * HEAD_DIM;

    let_next_start();
    const int position = (int)load4(&state->position);
    const int length = position + 1;
    const int share = max(MIN_KEYS, (length + SPLITS * SHARE_GRAIN - 1) / (SPLITS * SHARE_GRAIN) * SHARE_GRAIN);
    const int active = (length + share - 1) / share;
    // A step queued past the end writes nothing. Leaving counts as an end: wait first, as every kernel does.
    if (position >= CONTEXT || split >= active) {
        wait_for_previous();
        return;
    }
    const int begin = split * share, end = min(position, begin + share);  // of the keys in the cache
    const bool has_new = split == active - 1;                                  // this share ends with the new token
#if KV_INT8
    half_t *key_scales = scales + kv_head * SCALE_PITCH, *value_scales = key_scales + KV_HEADS * SCALE_PITCH;
#else
    half_t *key_scales = nullptr, *value_scales = nullptr;
#endif
    Ring ring;
    ring.start(shared, keys, vals, key_scales, value_scales, begin, end);
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) ring.load(stage, stage * STAGE_KEYS);
    Angles angles;
    angles.load(rope + (u64)position * (HEAD_DIM / 2), part);

    wait_for_previous();
    HeadVector raw[GROUP], raw_k;
    uint4 new_v = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int g = 0; g < GROUP; ++g) raw[g].load(qkv + (kv_head * GROUP + g) * HEAD_DIM, part);
    raw_k.load(qkv + (HEADS + kv_head) * HEAD_DIM, part);
    if (d < HEAD_DIM) new_v = load16(qkv + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + d);
    float q[GROUP][8];
    Running run = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        raw[g].rotate(q[g], q_norm, angles, part);
        run.peak[g] = LOWEST;
#pragma unroll
        for (int j = 0; j < 8; ++j) q[g][j] *= SCALE_LOG2E;
    }
    if (has_new && warp == 0) {  // its first slot takes the new token
        float k[8], scores[1][GROUP];
        raw_k.rotate(k, k_norm, angles, part);
        float k_scale = 1.f, v_scale = 1.f;
#if KV_INT8
        half_t k_bits, v_bits;
        const uint2 k_piece = quantize<LANES_PER_HEAD>(k, k_bits);
        unpack8(new_v, k);
        const uint2 v_piece = quantize<LANES_PER_HEAD>(k, v_bits);
        k_scale = scale_value(k_bits), v_scale = scale_value(v_bits);
#else
        const uint4 k_piece = pack8(k), v_piece = new_v;
#endif
        unpack_piece(k_piece, k);  // as the cache will give it back
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            const float score = dot8(q[g], k);
            scores[0][g] = slot == 0 ? (KV_INT8 ? score * k_scale : score) : LOWEST;
        }
        run.add<1>(scores, &v_piece, &v_scale);
        if (slot == 0 && d < HEAD_DIM) {
            *(Piece*)(keys + (u64)position * HEAD_DIM + d) = k_piece;
            *(Piece*)(vals + (u64)position * HEAD_DIM + d) = v_piece;
        }
#if KV_INT8
        if (lane == 0) key_scales[position] = k_bits, value_scales[position] = v_bits;
#endif
    }

    int stage = 0;
    for (int first = 0; begin + first < end; first += STAGE_KEYS) {
        ring.wait();
        Piece v[UNROLL];
        float scores[UNROLL][GROUP], v_scales[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float k[8], k_scale;
            ring.read_key(stage, first, u, k, k_scale);
            v[u] = ring.read_value(stage, first, u, v_scales[u]);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                const float score = dot8(q[g], k);
                scores[u][g] = ring.holds(first, u) ? (KV_INT8 ? score * k_scale : score) : LOWEST;
            }
        }
        run.add<UNROLL>(scores, v, v_scales);
        ring.release();
        ring.load(stage, first + DEPTH * STAGE_KEYS);
        stage = stage + 1 == DEPTH ? 0 : stage + 1;
    }
    wait_copies<0>();
    __syncthreads();  // the ring is free

#pragma unroll
    for (int g = 0; g < GROUP; ++g) {  // merge the slots of the warp
        float top = run.peak[g];
#pragma unroll
        for (int offset = LANES_PER_HEAD; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
        const float shrink = exp2f(run.peak[g] - top);
        run.sum[g] *= shrink;
#pragma unroll
        for (int j = 0; j < 8; ++j) run.acc[g][j] *= shrink;
#pragma unroll
        for (int offset = LANES_PER_HEAD; offset < 32; offset *= 2) {
            run.sum[g] += __shfl_xor_sync(0xffffffffu, run.sum[g], offset);
#pragma unroll
            for (int j = 0; j < 8; ++j) run.acc[g][j] += __shfl_xor_sync(0xffffffffu, run.acc[g][j], offset);
        }
        if (slot == 0 && d < HEAD_DIM) {
#pragma unroll
            for (int j = 0; j < 8; ++j) values[warp][g][d + j] = run.acc[g][j];
        }
        if (lane == 0) merges[warp][g] = {top, run.sum[g]};
    }
    __syncthreads();

    constexpr int RECORD = HEAD_DIM + 2;  // values, peak, sum
    float* mine = partial + ((u64)split * KV_HEADS + kv_head) * GROUP * RECORD;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {  // merge the warps
        const int g = i / HEAD_DIM;
        float top = LOWEST, total = 0.f, value = 0.f;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, merges[w][g].peak);
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2f(merges[w][g].peak - top);
            total += weight * merges[w][g].sum;
            value += weight * values[w][g][i % HEAD_DIM];
        }
        if (active == 1) {
            output[kv_head * GROUP * HEAD_DIM + i] = to_half(value / total);
        } else {
            mine[g * RECORD + i % HEAD_DIM] = value;
            if (i % HEAD_DIM == 0) mine[g * RECORD + HEAD_DIM] = top, mine[g * RECORD + HEAD_DIM + 1] = total;
        }
    }
    if (active == 1) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(counters + kv_head, 1u) == active - 1;
        if (is_last) counters[kv_head] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    const float* all = partial + (u64)kv_head * GROUP * RECORD;
    constexpr u64 NEXT = (u64)KV_HEADS * GROUP * RECORD;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {  // merge the splits
        const float* record = all + i / HEAD_DIM * RECORD;
        float top = LOWEST, total = 0.f, value = 0.f;
        for (int s = 0; s < active; ++s) top = fmaxf(top, load4f(record + s * NEXT + HEAD_DIM));
#pragma unroll 4
        for (int s = 0; s < active; ++s) {
            const float weight = exp2f(load4f(record + s * NEXT + HEAD_DIM) - top);
            total += weight * load4f(record + s * NEXT + HEAD_DIM + 1);
            value += weight * load4f(record + s * NEXT + i % HEAD_DIM);
        }
        output[kv_head * GROUP * HEAD_DIM + i] = to_half(value / total);
    }
}

// Attention of one new token over the linear KV cache, split over the sequence (flash decoding: Dao et al. 2023) with an
// online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867). Rotates q and k, writes the new K and V in place, and the
// last CTA of a KV head to finish merges the splits.
//
// qkv: [(HEADS + 2 KV_HEADS) HEAD_DIM]; cache: this layer's [2][KV_HEADS][CONTEXT][HEAD_DIM]; rope: [CONTEXT][HEAD_DIM / 2]
// (cos, sin); partial: float32 [SPLITS][KV_HEADS][GROUP][HEAD_DIM + 2]; counters: uint32 [KV_HEADS], 0 between launches;
// output: [HEADS][HEAD_DIM]. Grid (KV_HEADS, SPLITS); how many splits work is decided by the position.
#include "rope.cuh"

constexpr int GROUP = HEADS / KV_HEADS;  // query heads of a KV head
constexpr int WARPS = GROUP * HEAD_DIM > 1024 ? 4 : 8, THREADS = 32 * WARPS;
constexpr int UNROLL = 4;                // keys of a slot in flight
constexpr int MIN_KEYS = 64;             // of a split: below, more CTAs bring nothing
constexpr float LOWEST = -1e30f;         // stands for -infinity without its NaNs

struct Merge {  // running maximum (base 2), sum and weighted values of one query head
    float peak, sum;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_decode(const half_t* qkv, half_t* cache, const float2* rope, const half_t* q_norm, const half_t* k_norm,
                     const State* state, float* partial, u32* counters, half_t* output) {
    __shared__ float values[WARPS][GROUP][HEAD_DIM];
    __shared__ Merge merges[WARPS][GROUP];
    __shared__ bool is_last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv_head = blockIdx.x;
    const int slot = lane / LANES_PER_HEAD, part = lane % LANES_PER_HEAD, d = 8 * part;
    half_t* keys = cache + (u64)kv_head * CONTEXT * HEAD_DIM;
    half_t* vals = keys + (u64)KV_HEADS * CONTEXT * HEAD_DIM;

    let_next_start();
    wait_for_previous();
    const int position = (int)load4(&state->position);
    if (position >= CONTEXT) return;  // a step queued past the end writes nothing
    const int length = position + 1;
    const int share = max(MIN_KEYS, (length + SPLITS - 1) / SPLITS);
    const int active = (length + share - 1) / share;
    if (blockIdx.y >= active) return;
    const int begin = blockIdx.y * share, end = min(length, begin + share);
    const float2* angles = rope + (u64)position * (HEAD_DIM / 2);

    if (end == length) {  // this CTA's share holds the new token
        if (warp == 0) {
            float k[8];
            load_rotated(k, qkv + (HEADS + kv_head) * HEAD_DIM, k_norm, angles, part);
            if (slot == 0 && d < HEAD_DIM) *(uint4*)(keys + (u64)position * HEAD_DIM + d) = pack8(k);
        } else if (warp == 1 && slot == 0 && d < HEAD_DIM) {
            *(uint4*)(vals + (u64)position * HEAD_DIM + d) = load16(qkv + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + d);
        }
        __syncthreads();
    }
    float q[GROUP][8], acc[GROUP][8] = {}, peak[GROUP], sum[GROUP] = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        load_rotated(q[g], qkv + (kv_head * GROUP + g) * HEAD_DIM, q_norm, angles, part);
        peak[g] = LOWEST;
#pragma unroll
        for (int j = 0; j < 8; ++j) q[g][j] *= SCALE_LOG2E;
    }

    constexpr int STRIDE = WARPS * HEAD_SLOTS;
    for (int base = begin + warp * HEAD_SLOTS + slot; __any_sync(0xffffffffu, base < end); base += STRIDE * UNROLL) {
        uint4 k[UNROLL], v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int key = base + u * STRIDE;
            const bool inside = key < end && d < HEAD_DIM;
            k[u] = inside ? load16(keys + (u64)key * HEAD_DIM + d) : make_uint4(0, 0, 0, 0);
            v[u] = inside ? load16(vals + (u64)key * HEAD_DIM + d) : make_uint4(0, 0, 0, 0);
        }
        float scores[UNROLL][GROUP];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float f[8];
            unpack8(k[u], f);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                float dot = 0.f;
#pragma unroll
                for (int j = 0; j < 8; ++j) dot += q[g][j] * f[j];
                dot = group_sum<LANES_PER_HEAD>(dot);
                scores[u][g] = base + u * STRIDE < end ? dot : LOWEST;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float top = peak[g];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) top = fmaxf(top, scores[u][g]);
            const float shrink = exp2f(peak[g] - top);
            peak[g] = top;
            sum[g] *= shrink;
#pragma unroll
            for (int j = 0; j < 8; ++j) acc[g][j] *= shrink;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                scores[u][g] = scores[u][g] == LOWEST ? 0.f : exp2f(scores[u][g] - top);
                sum[g] += scores[u][g];
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float f[8];
            unpack8(v[u], f);
#pragma unroll
            for (int g = 0; g < GROUP; ++g)
#pragma unroll
                for (int j = 0; j < 8; ++j) acc[g][j] += scores[u][g] * f[j];
        }
    }

#pragma unroll
    for (int g = 0; g < GROUP; ++g) {  // merge the slots of the warp
        float top = peak[g];
#pragma unroll
        for (int offset = LANES_PER_HEAD; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
        const float shrink = exp2f(peak[g] - top);
        sum[g] *= shrink;
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[g][j] *= shrink;
#pragma unroll
        for (int offset = LANES_PER_HEAD; offset < 32; offset *= 2) {
            sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], offset);
#pragma unroll
            for (int j = 0; j < 8; ++j) acc[g][j] += __shfl_xor_sync(0xffffffffu, acc[g][j], offset);
        }
        if (slot == 0 && d < HEAD_DIM) {
#pragma unroll
            for (int j = 0; j < 8; ++j) values[warp][g][d + j] = acc[g][j];
        }
        if (lane == 0) merges[warp][g] = {top, sum[g]};
    }
    __syncthreads();

    constexpr int RECORD = HEAD_DIM + 2;  // values, peak, sum
    float* mine = partial + ((u64)blockIdx.y * KV_HEADS + kv_head) * GROUP * RECORD;
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

// What every kernel shares: the 16-bit type of weights and activations, loads, asynchronous copies, reductions.
// No CUDA header is included, so that NVRTC alone suffices. BF16 (0 or 1) chooses the 16-bit type.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef BF16
#define BF16 0
#endif

#ifndef NORM_SIZE
#define NORM_SIZE COLS  // values that an RMSNorm takes the mean over: those after them are zeros
#endif

typedef u16 half_t;  // the bits of an fp16 or bf16 value

#ifndef NORM_OFFSET
#define NORM_OFFSET 0.f  // added to every norm's weight (Gemma)
#endif

#ifndef LOGITS_SOFTCAP
#define LOGITS_SOFTCAP 0.f  // that the LM head's sums stay below in magnitude; 0 = they are the logits
#endif

#ifndef ORDERED
#define ORDERED 0  // columns are put in the order that a matrix has them in: column c is at places[c]
#endif
#if ORDERED
#define PLACES_PARAMETER , const int* places
#define STORE_PAIR(row, column, pair) store_apart(row, places + (column), pair)
#else
#define PLACES_PARAMETER
#define STORE_PAIR(row, column, pair) (*(u32*)(row + column) = (pair))
#endif

#ifndef KV_INT8
#define KV_INT8 0  // the KV cache has 8-bit values with scales: see kv_int8.cuh
#endif

#ifndef KV_FP8
#define KV_FP8 0  // which are E4M3; only with KV_INT8
#endif

// Elements, and scales with KV_INT8, from a layer's K of one KV slot to the next one's; 0 = there is one slot.
#ifndef SLOT_STRIDE
#define SLOT_STRIDE 0
#define SCALE_SLOT_STRIDE 0
#endif

#if KV_INT8
typedef signed char item_t;  // of the KV cache, the bits of an E4M3 value with KV_FP8
#else
typedef half_t item_t;
#endif

struct State {       // of the running sequence; written by the last kernel of a step only
    int token;       // full-vocabulary id to feed next; negative after a failed step
    int position;    // of that token in the KV cache
    u64 step;        // number of tokens sampled since the request began
    u64 best;        // order key << 32 | ~row of the largest score of this step
    u32 nan_seen;
    u32 unused;
};

struct Chunk {  // of a prompt; written before the kernels of a prefill step are queued, so they may read it at once
    int position;  // of its first token in the KV cache
    int count;     // of its tokens; arrays may have more rows, which nobody reads
    // With SLOT_STRIDE a third int follows, the KV slot.
};

// --- programmatic dependent launch -------------------------------------------------------------------------------
// A kernel may start while the one before it still runs. Until wait_for_previous it may read weights and nothing else.

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- 16-bit values ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float2 unpack_fp16(u32 v) {
    float2 f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(f.x), "=f"(f.y) : "r"(v));
    return f;
}

__device__ __forceinline__ float2 unpack2(u32 v) {
#if BF16
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#else
    return unpack_fp16(v);
#endif
}

__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 v;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
    return v;
}

// Of a gated unit (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, or gelu(gate) * up. That is the approximation by tanh
// (Hendrycks & Gimpel 2016, arXiv 1606.08415), and (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)).
template <bool WITH_GELU>
__device__ __forceinline__ float gated(float gate, float up) {
    const float exponent = WITH_GELU ? -1.5957691216f * gate * (1.f + 0.044715f * gate * gate) : -gate;
    return gate / (1.f + __expf(exponent)) * up;
}

__device__ __forceinline__ float offset_weight(float weight) { return NORM_OFFSET != 0.f ? weight + NORM_OFFSET : weight; }

__device__ __forceinline__ float to_logit(float sum) {
#ifdef LOGITS_SCALE
    sum *= LOGITS_SCALE;
#endif
    constexpr float INVERSE = LOGITS_SOFTCAP > 0.f ? 1.f / LOGITS_SOFTCAP : 0.f;
    return LOGITS_SOFTCAP > 0.f ? LOGITS_SOFTCAP * tanhf(sum * INVERSE) : sum;
}

__device__ __forceinline__ half_t to_half(float value) { return (half_t)pack2(value, 0.f); }
__device__ __forceinline__ float to_float(half_t value) { return unpack2(value).x; }

__device__ __forceinline__ void unpack8(uint4 v, float* f) {
    float2 a = unpack2(v.x), b = unpack2(v.y), c = unpack2(v.z), d = unpack2(v.w);
    f[0] = a.x, f[1] = a.y, f[2] = b.x, f[3] = b.y, f[4] = c.x, f[5] = c.y, f[6] = d.x, f[7] = d.y;
}

__device__ __forceinline__ uint4 pack8(const float* f) {
    return make_uint4(pack2(f[0], f[1]), pack2(f[2], f[3]), pack2(f[4], f[5]), pack2(f[6], f[7]));
}

// --- memory -------------------------------------------------------------------------------------------------------
// Activations are read through L2 only: with overlapping kernels a line in L1 may be older than what was written.

__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ float4 load16f(const float* p) {
    uint4 v = load16(p);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

__device__ __forceinline__ uint2 load8(const void* p) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ u32 load4(const void* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ float load4f(const float* p) { return __uint_as_float(load4(p)); }

__device__ __forceinline__ Chunk load_chunk(const Chunk* p) {
    const uint2 v = load8(p);
    return {(int)v.x, (int)v.y};
}

__device__ __forceinline__ int load_slot(const Chunk* p) { return SLOT_STRIDE ? (int)load4((const int*)p + 2) : 0; }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory; only the first ``bytes`` are read, the rest becomes zero.
__device__ __forceinline__ void copy16_async(u32 shared, const void* global, u32 bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy16_async(void* shared, const void* global, u32 bytes = 16) {
    copy16_async(shared_address(shared), global, bytes);
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Brings 32 bytes to the L1 cache, of memory that no kernel writes.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

// Two 16-bit values of neighbouring columns to where ``places`` has these.
__device__ __forceinline__ void store_apart(half_t* row, const int* places, u32 pair) {
    const int2 own = *(const int2*)places;
    row[own.x] = (half_t)pair, row[own.y] = (half_t)(pair >> 16);
}

// --- CTAs that share a result --------------------------------------------------------------------------------------
// Whether this CTA is the last of ``count`` to get here: what all of them wrote before can be read then. ``arrived`` is 0
// between launches. All threads call it.
__device__ __forceinline__ bool is_last_to_arrive(u32* arrived, u32 count) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrived, 1u) == count - 1;
        if (is_last) *arrived = 0;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// The same of warps.
__device__ __forceinline__ bool is_last_warp_to_arrive(u32* arrived, u32 count) {
    u32 before = 0;
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        before = atomicAdd(arrived, 1u);
        if (before == count - 1) *arrived = 0;
    }
    before = __shfl_sync(0xffffffffu, before, 0);
    __threadfence();
    return before == count - 1;
}

// --- reductions ---------------------------------------------------------------------------------------------------

template <int WIDTH>  // over aligned groups of WIDTH lanes
__device__ __forceinline__ float group_sum(float v) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

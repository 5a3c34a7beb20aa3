// LoRA adapters in a GEMV's own kernel: both halves of B (A x), without a kernel between two GEMVs.
//
// The first LORA_CTAS CTAs make the sums of A x, one in every LORA_CTAS each, as soon as they have x. Every CTA waits for them when
// it has the sums of its rows of W. A sum that is not there has the bits NOT_YET, with which the array is filled before a step.
// CTAs start in the order of their numbers, and LORA_CTAS are no more than there are SMs: a CTA never waits for one that has no place.
//
// a: 16-bit [adapters][LORA_SUMS][COLS]; b: 16-bit [adapters][ROWS][LORA_RANK]; sums: float32 [LORA_SUMS]; adapters: int32 [1], -1 = none.
#pragma once
#include "lora.cuh"

#if LORA_RANK > 0
#define GEMV_LORA_PARAMETERS , const half_t *lora_a, const half_t *lora_b, float *lora_sums, const int *lora_adapters
#define GEMV_LORA_ARGUMENTS lora_a, lora_b, lora_sums, lora_adapters
#else
#define GEMV_LORA_PARAMETERS
#define GEMV_LORA_ARGUMENTS
#endif

struct GemvLora {
#if LORA_RANK > 0
    static constexpr u32 NOT_YET = 0xffffffffu;
    static constexpr int ROUNDS = (LORA_SUMS + LORA_CTAS - 1) / LORA_CTAS;  // sums that a CTA makes at most
    const half_t* all_a;
    const half_t* all_b;
    float* sums;
    int adapter;  // < 0: none

    __device__ __forceinline__ GemvLora(const half_t* a, const half_t* b, float* own_sums, const int* adapters)
        : all_a(a), all_b(b), sums(own_sums), adapter((int)load4(adapters)) {}  // uploaded before the step

    // Of the adapter: the row of A for a sum, and eight values of a row of B.
    __device__ __forceinline__ const uint4* a_row(int sum) const {
        return (const uint4*)(all_a + ((u64)adapter * LORA_SUMS + sum) * COLS);
    }
    __device__ __forceinline__ const uint4* b_eight(int row, int eight) const {
        return (const uint4*)(all_b + ((u64)adapter * ROWS + row) * LORA_RANK) + eight;
    }

    // The sum that this CTA makes in a round, or one that is none.
    __device__ __forceinline__ int sum_of(int round) const { return blockIdx.x + round * LORA_CTAS; }
    __device__ __forceinline__ bool makes(int round) const {
        return adapter >= 0 && blockIdx.x < LORA_CTAS && sum_of(round) < LORA_SUMS;
    }

    __device__ __forceinline__ void store(int sum, float value) const {
        const u32 bits = value == value ? __float_as_uint(value) : 0x7fffffffu;  // no NaN is NOT_YET
        asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(sums + sum), "r"(bits) : "memory");
    }

    // Eight sums from ``first`` on, those that are not there as NOT_YET.
    __device__ __forceinline__ void read(u32 (&v)[8], int first) const {
#pragma unroll
        for (int half = 0; half < 8; half += 4)
            asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[half]), "=r"(v[half + 1]), "=r"(v[half + 2]), "=r"(v[half + 3])
                         : "l"(sums + first + half)
                         : "memory");
    }

    static __device__ __forceinline__ bool complete(const u32 (&v)[8]) {
        bool all = true;
#pragma unroll
        for (int i = 0; i < 8; ++i) all = all && v[i] != NOT_YET;
        return all;
    }
#endif
};

// What is added to the rows of a segment. LANES lanes have eight values each of a row of B and add up what they make of them. B is
// brought to the L2 cache before the kernel waits for the one that computes x: from there it takes no longer than the sums. A CTA has
// a multiple of GRAIN rows.
template <int SEGMENT, int THREADS, int GRAIN>
struct LoraTerms {
#if LORA_RANK > 0
    static constexpr int EIGHTS = LORA_RANK / 8;
    static constexpr int LANES = EIGHTS > 16 ? 32 : EIGHTS > 8 ? 16 : EIGHTS > 4 ? 8 : EIGHTS > 2 ? 4 : EIGHTS;
    static constexpr int ROWS_MOST = ((ROWS + GRAIN - 1) / GRAIN + LORA_CTAS - 1) / LORA_CTAS * GRAIN;  // of a CTA
    static constexpr int SIZE = ROWS_MOST < SEGMENT ? ROWS_MOST : SEGMENT, SEGMENTS = ROWS_MOST > SEGMENT ? 2 : 1;
    static constexpr int STEP = THREADS / LANES, OWN = (SIZE + STEP - 1) / STEP;  // rows
    u32 sums[8];  // eight sums from ``place`` on
    int place = -1;

    __device__ __forceinline__ int row(int i) const { return i * STEP + threadIdx.x / LANES; }
    __device__ __forceinline__ int eight() const { return threadIdx.x % LANES; }
    __device__ __forceinline__ bool has(const GemvLora& lora, int i, int count) const {
        return lora.adapter >= 0 && (LANES == EIGHTS || eight() < EIGHTS) && row(i) < min(count, SIZE);
    }
    __device__ __forceinline__ int place_of(int row) const { return lora_part(row) * LORA_RANK + 8 * eight(); }

    // first: the CTA's first row; count: how many rows it has.
    __device__ __forceinline__ void fetch(const GemvLora& lora, int first, int count) const {
        if (lora.adapter < 0) return;
        prefetch_rows(lora.all_b, lora.adapter, first, count, threadIdx.x, THREADS);
    }

    // first: the segment's first row; count: how many rows are left; terms: [SIZE], in shared memory. A barrier has to follow.
    __device__ __forceinline__ void make(const GemvLora& lora, int first, int count, float* terms) {
        if (lora.adapter < 0) return;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            if (i * STEP >= count) break;
            float term = 0.f;
            if (has(lora, i, count)) {
                const int own = place_of(first + row(i));
                const uint4 values = *lora.b_eight(first + row(i), eight());
                if (own != place) lora.read(sums, own);
                while (!lora.complete(sums)) lora.read(sums, own);
                place = own;
                const auto sum = [&](int j) { return __uint_as_float(sums[j]); };
                term = lora_dot(values, make_float4(sum(0), sum(1), sum(2), sum(3)), make_float4(sum(4), sum(5), sum(6), sum(7)));
            }
            term = group_sum<LANES>(term);
            if (eight() == 0 && row(i) < SIZE) terms[row(i)] = term;
        }
    }
#else
    static constexpr int SIZE = 1, SEGMENTS = 1;
    __device__ __forceinline__ void fetch(const GemvLora&, int, int) {}
    __device__ __forceinline__ void make(const GemvLora&, int, int, float*) {}
#endif
};

#if LORA_RANK > 0
// The last warp of the CTA adds up what all warps have written; the others go on. Returns whether this is the last one.
template <int WARPS>
__device__ __forceinline__ bool gather_in_last_warp() {
    __syncwarp();
    if (threadIdx.x / 32 < WARPS - 1) {
        asm volatile("bar.arrive 1, %0;" ::"n"(32 * WARPS) : "memory");
        return false;
    }
    asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory");
    return true;
}
#endif

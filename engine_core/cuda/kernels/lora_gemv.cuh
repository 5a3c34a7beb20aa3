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

#if LORA_RANK > 0
constexpr int LORA_PLACES = LORA_SUMS / 4;  // of the sums in shared memory
#else
constexpr int LORA_PLACES = 1;
#endif

struct GemvLora {
#if LORA_RANK > 0
    static constexpr u32 NOT_YET = 0xffffffffu;
    static constexpr int ROUNDS = (LORA_SUMS + LORA_CTAS - 1) / LORA_CTAS;  // sums that a CTA makes at most
    const half_t* a;
    const half_t* b;
    float* sums;
    int adapter;  // < 0: none

    __device__ __forceinline__ GemvLora(const half_t* all_a, const half_t* all_b, float* own_sums, const int* adapters)
        : sums(own_sums), adapter((int)load4(adapters)) {  // uploaded before the step
        a = all_a + (u64)max(adapter, 0) * LORA_SUMS * COLS;
        b = all_b + (u64)max(adapter, 0) * ROWS * LORA_RANK;
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

    // All sums to shared memory, once they are there; a barrier has to follow.
    __device__ __forceinline__ void load(float4* shared, int threads) const {
        if (adapter < 0) return;
        for (int i = threadIdx.x; i < LORA_SUMS / 4; i += threads) {
            uint4 v;
            do {
                asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                             : "l"(sums + 4 * i)
                             : "memory");
            } while (v.x == NOT_YET || v.y == NOT_YET || v.z == NOT_YET || v.w == NOT_YET);
            shared[i] = make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
        }
    }
#endif
};

#if LORA_RANK > 0
// A row of B, whose first values are read while the GEMV's sums are being made.
template <int GRAIN>
struct LoraRow {
    static constexpr int MOST = 32 / GRAIN, HELD = LORA_RANK < MOST ? LORA_RANK : MOST;  // values
    uint4 held[HELD / 8];

    __device__ __forceinline__ void read(const GemvLora& lora, int row) {
        const uint4* values = (const uint4*)(lora.b + (u64)row * LORA_RANK);
#pragma unroll
        for (int i = 0; i < HELD / 8; ++i) held[i] = values[i];
    }

    // What is added to the sum of the row.
    __device__ __forceinline__ float term(const GemvLora& lora, int row, const float4* sums) const {
        const float4* own = sums + lora_part(row) * (LORA_RANK / 4);
        const uint4* values = (const uint4*)(lora.b + (u64)row * LORA_RANK);
        float term = 0.f;
#pragma unroll
        for (int i = 0; i < HELD / 8; ++i) term += lora_dot(held[i], own[2 * i], own[2 * i + 1]);
#pragma unroll 4
        for (int i = HELD / 8; i < LORA_RANK / 8; ++i) term += lora_dot(values[i], own[2 * i], own[2 * i + 1]);
        return term;
    }
};
#endif

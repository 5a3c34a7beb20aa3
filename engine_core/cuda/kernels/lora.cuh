// What LoRA adapters add to a row of a GEMM: B times the sums of A x that lora.cu has made. lora_gemv.cuh: the same of a GEMV.
//
// b: 16-bit [adapters][ROWS][LORA_RANK]; sums: float32 [tokens][LORA_PARTS * LORA_RANK]; adapters: int32 [tokens], -1 = none. Stacked
// linears have sums of their own: those of rows from LORA_SPLIT_1 and LORA_SPLIT_2 on are the second and third part; with
// LORA_PAIRS rows are of two parts in turn. LORA_RANK 0: there are no adapters.
#pragma once
#include "common.cuh"

#ifndef LORA_RANK
#define LORA_RANK 0
#endif

#if LORA_RANK > 0
static_assert(LORA_RANK % 8 == 0, "b is read in 16 bytes");
#define LORA_PARAMETERS , const half_t *lora_b, const float *lora_sums, const int *lora_adapters
#define LORA_ARGUMENTS lora_b, lora_sums, lora_adapters
#else
#define LORA_PARAMETERS
#define LORA_ARGUMENTS
#endif

#if LORA_RANK > 0
constexpr int LORA_SUMS = LORA_PARTS * LORA_RANK;

// The product of eight 16-bit values of B and as many sums.
__device__ __forceinline__ float lora_dot(uint4 values, float4 s, float4 t) {
    float v[8];
    unpack8(values, v);
    return v[0] * s.x + v[1] * s.y + v[2] * s.z + v[3] * s.w + v[4] * t.x + v[5] * t.y + v[6] * t.z + v[7] * t.w;
}

// The part whose sums a row takes.
__device__ __forceinline__ int lora_part(int row) {
    return LORA_PAIRS ? row % 2 : (int)(row >= LORA_SPLIT_1) + (int)(row >= LORA_SPLIT_2);
}
#endif

struct Lora {
#if LORA_RANK > 0
    const half_t* b;
    const float* sums;
    const int* adapters;

    // What is added to the sum of a row for a token.
    __device__ __forceinline__ float term(int row, int token) const {
        const int adapter = (int)load4(adapters + token);
        if (adapter < 0) return 0.f;
        const float* own = sums + ((u64)token * LORA_PARTS + lora_part(row)) * LORA_RANK;
        const half_t* weights = b + ((u64)adapter * ROWS + row) * LORA_RANK;
        float sum = 0.f;
#pragma unroll 2
        for (int r = 0; r < LORA_RANK; r += 8) sum += lora_dot(*(const uint4*)(weights + r), load16f(own + r), load16f(own + r + 4));
        return sum;
    }
#endif
};

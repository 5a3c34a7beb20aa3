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

// Brings rows [first, first + count) of an adapter's B to the L2 cache: the part of one of several threads.
__device__ __forceinline__ void prefetch_rows(const half_t* b, int adapter, int first, int count, int thread, int threads) {
    const u64 begin = (u64)(b + ((u64)adapter * ROWS + first) * LORA_RANK), end = begin + (u64)count * LORA_RANK * sizeof(half_t);
    for (u64 line = (begin & ~127ull) + thread * 128; line < end; line += threads * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
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

    // Adds to the sums [2 tokens][2] of rows ``row`` and ``row`` + 8 what the tokens' adapters, ``numbers``, add. The loads do not
    // wait for one another. The whole warp calls it.
    __device__ __forceinline__ void add(float (&values)[2][2], const int (&numbers)[2], int row, int token) const {
        if (!__any_sync(0xffffffffu, numbers[0] >= 0 || numbers[1] >= 0)) return;
        float added[2][2] = {};
#pragma unroll 2
        for (int r = 0; r < LORA_RANK; r += 8) {
            uint4 w[2][2];
            float4 s[2][2], t[2][2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int own_row = min(row + 8 * half, ROWS - 1), own_token = numbers[i] < 0 ? 0 : token + i;
                    w[i][half] = *(const uint4*)(b + ((u64)max(numbers[i], 0) * ROWS + own_row) * LORA_RANK + r);
                    const float* own = sums + ((u64)own_token * LORA_PARTS + lora_part(own_row)) * LORA_RANK + r;
                    s[i][half] = load16f(own), t[i][half] = load16f(own + 4);
                }
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) added[i][half] += lora_dot(w[i][half], s[i][half], t[i][half]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (numbers[i] >= 0) values[i][half] += added[i][half];
    }
#endif
};

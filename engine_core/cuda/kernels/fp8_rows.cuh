// Activations in fp8: codes of E4M3 and a float32 scale for each row, its largest magnitude / 448.
#pragma once
#include "common.cuh"

constexpr float E4M3_MAX = 448.f;

// The codes of four values, the first one lowest: nearest, ties to even. Magnitudes above 448 become 448, a NaN stays one.
__device__ __forceinline__ u32 to_e4m3x4(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return low | (u32)high << 16;
#else
    const float v[4] = {a, b, c, d};
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 bits = __float_as_uint(v[i]), magnitude = bits & 0x7fffffffu;
        const float f = fminf(__uint_as_float(magnitude), E4M3_MAX);
        // From 2^-6 on 3 of 23 bits are kept, the exponent's bias becomes 7; below it values are multiples of 2^-9.
        const u32 rounded = __float_as_uint(f) + 0x7ffffu + (__float_as_uint(f) >> 20 & 1);
        const u32 code = f < 0.015625f ? (u32)__float2int_rn(f * 512.f) : (rounded >> 20) - (120u << 3);
        codes |= ((magnitude > 0x7f800000u ? 0x7fu : code) | (bits >> 31) << 7) << 8 * i;
    }
    return codes;
#endif
}

// The largest of what all threads of a CTA of SIZE have.
template <int SIZE>
__device__ __forceinline__ float cta_max(float v) {
    __shared__ float maxima[SIZE / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = v;
    __syncthreads();
    v = maxima[0];
#pragma unroll
    for (int w = 1; w < SIZE / 32; ++w) v = fmaxf(v, maxima[w]);
    return v;
}

// What a row's values are multiplied by; its scale is written by one thread.
template <int SIZE>
__device__ __forceinline__ float quantizer(float own_max, float* scale) {
    const float peak = cta_max<SIZE>(own_max);
    if (threadIdx.x == 0) *scale = peak / E4M3_MAX;
    return peak > 1e-30f ? E4M3_MAX / peak : 0.f;
}

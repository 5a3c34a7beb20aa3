// The values of an fp8 KV cache: E4M3 (Micikevicius et al. 2022, arXiv 2209.05433), of which kv_int8.cuh has scales and layout. Each keeps
// three bits of its own, however large others of its vector are, where int8 has steps of a 127th of the largest: keys whose biases
// make a few elements very large lose less. Where the GPU has no instruction for the type (before sm_89), bits are moved.
#pragma once
#include "common.cuh"

// That a value can be. E4M3 goes on to 448, but then scales and their products with weights would be among fp16's smallest numbers,
// which have few bits; so values below a 1792th of the vector's largest have fewer than three.
constexpr float LARGEST = 28.f;

// The nearest, ties to even, of at most 448 in magnitude, as satfinite rounds.
__device__ __forceinline__ u32 to_e4m3(float x) {
    const u32 bits = __float_as_uint(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
    const u32 tiny = (u32)__float2int_rn(fabsf(x) * 512.f);  // below 2^-6 all are multiples of 2^-9
    const u32 normal = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - ((127 - 7) << 3);
    return sign | min(size < 0x3c800000u ? tiny : normal, 0x7eu);
}

__device__ __forceinline__ u32 quantize4(const float* x, float inverse) {
#if __CUDA_ARCH__ >= 890
    u32 word;
    asm("{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; mov.b32 %0, {l, h};}"
        : "=r"(word) : "f"(x[0] * inverse), "f"(x[1] * inverse), "f"(x[2] * inverse), "f"(x[3] * inverse));
    return word;
#else
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= to_e4m3(x[i] * inverse) << 8 * i;
    return word;
#endif
}

// Eight values in 16 bits, exactly. Exponent and mantissa go to their places, and a product makes up for the exponents' other bias.
__device__ __forceinline__ uint4 quantized_to_half(uint2 quantized) {
    u32 pairs[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const u32 word = pair < 2 ? quantized.x : quantized.y;
#if !BF16 && __CUDA_ARCH__ >= 890
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pairs[pair]) : "h"((u16)(pair % 2 ? word >> 16 : word)));
#else
        const u32 x = __byte_perm(word, 0, pair % 2 ? 0x3424 : 0x1404);  // each byte high in its half
#if BF16  // 2^120
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(pairs[pair]) : "r"((x & 0x80008000u) | ((x & 0x7f007f00u) >> 4)), "r"(0x7b807b80u), "r"(0x80008000u));
#else     // 2^8
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pairs[pair]) : "r"((x & 0x80008000u) | ((x & 0x7f007f00u) >> 1)), "r"(0x5c005c00u));
#endif
#endif
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

__device__ __forceinline__ void unpack_quantized(uint2 quantized, float* f) { unpack8(quantized_to_half(quantized), f); }

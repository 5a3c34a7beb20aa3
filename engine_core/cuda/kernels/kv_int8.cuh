// The KV cache of 8-bit values. A vector x of one head and token is kept as quantized values rint(x / s) from -127 to 127 and one scale
// s = max |x| / 127 in fp16 (symmetric, dynamic, per token: the round-to-nearest of SmoothQuant, Xiao et al. 2023, arXiv
// 2211.10438), with KV_FP8 as the E4M3 nearest to x / s and s = max |x| / 28 (kv_fp8.cuh). The scales of a head lie side by side,
// SCALE_PITCH to a row, so that each row starts on 16 bytes.
#pragma once
#include "common.cuh"
#if KV_FP8
#include "kv_fp8.cuh"
#endif

constexpr int SCALE_PITCH = (CONTEXT + 7) / 8 * 8;

// Always fp16, whatever the weights are: fp16 has three bits more.
__device__ __forceinline__ half_t scale_bits(float scale) {
    half_t v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(scale));
    return v;
}

__device__ __forceinline__ float scale_value(half_t bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

// The larger magnitude, or NaN if one is: a damaged model must not become a whole one in the cache.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
}

#if !KV_FP8

constexpr float LARGEST = 127.f;  // that a value can be

// Eight quantized values as floats: with its sign bit flipped, a byte is value + 128, and 0x4b0000nn is 2^23 + nn.
__device__ __forceinline__ void unpack_quantized(uint2 quantized, float* f) {
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        const u32 bytes = (word ? quantized.y : quantized.x) ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 4; ++i) f[4 * word + i] = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 | i)) - 8388736.f;
    }
}

// Eight quantized values in 16 bits, exactly.
__device__ __forceinline__ uint4 quantized_to_half(uint2 quantized) {
    u32 pairs[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const u32 selector = pair % 2 ? 0x4342u : 0x4140u;
#if BF16  // 0x4300 | low 7 bits is 128 + those; -128 or, with the sign, -256 makes them the value
        const u32 x = __byte_perm(pair < 2 ? quantized.x : quantized.y, 0, selector);
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(pairs[pair]) : "r"((x & 0x007f007fu) | 0x43004300u), "r"(0x3f803f80u), "r"((x & 0x00800080u) | 0xc300c300u));
#else     // 0x6400 | n is 1024 + n
        const u32 x = __byte_perm((pair < 2 ? quantized.x : quantized.y) ^ 0x80808080u, 0x64646464u, selector);
        asm("sub.f16x2 %0, %1, %2;" : "=r"(pairs[pair]) : "r"(x), "r"(0x64806480u));
#endif
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Four values, divided by the scale.
__device__ __forceinline__ u32 quantize4(const float* x, float inverse) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int value = min(127, max(-127, __float2int_rn(x[i] * inverse)));
        word |= (u32)(value & 255) << 8 * i;
    }
    return word;
}

#endif

// Eight values a lane of a vector over WIDTH lanes; all lanes of the warp call it.
template <int WIDTH>
__device__ __forceinline__ uint2 quantize(const float* x, half_t& scale) {
    float peak = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) peak = max_or_nan(peak, fabsf(x[j]));
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) peak = max_or_nan(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
    scale = scale_bits(peak * (1.f / LARGEST));
    const float step = scale_value(scale), inverse = step == 0.f ? 0.f : 1.f / step;
    u32 words[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) words[word] = quantize4(x + 4 * word, inverse);
    return make_uint2(words[0], words[1]);
}

// The KV cache in 8 bits: a vector x of one head and token is kept as levels rint(x / s) from -127 to 127 and one scale
// s = max |x| / 127 in fp16 (symmetric, dynamic, per token: the round-to-nearest of SmoothQuant, Xiao et al. 2023, arXiv
// 2211.10438). The scales of a head lie side by side, SCALE_PITCH to a row, so that each row starts on 16 bytes.
#pragma once
#include "common.cuh"

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

// Eight levels to floats: with its sign bit turned, a byte is level + 128, and 0x4b0000nn is 2^23 + nn.
__device__ __forceinline__ void unpack_levels(uint2 levels, float* f) {
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        const u32 bytes = (word ? levels.y : levels.x) ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 4; ++i) f[4 * word + i] = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 | i)) - 8388736.f;
    }
}

// Eight values a lane of a vector over WIDTH lanes; all lanes of the warp call it.
template <int WIDTH>
__device__ __forceinline__ uint2 quantize(const float* x, half_t& scale) {
    float peak = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) peak = max_or_nan(peak, fabsf(x[j]));
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) peak = max_or_nan(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
    scale = scale_bits(peak * (1.f / 127.f));
    const float step = scale_value(scale), inverse = step == 0.f ? 0.f : 1.f / step;
    u32 words[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        words[word] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int level = min(127, max(-127, __float2int_rn(x[4 * word + i] * inverse)));
            words[word] |= (u32)(level & 255) << 8 * i;
        }
    }
    return make_uint2(words[0], words[1]);
}

// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in transformers, for one head vector
// held by LANES_PER_HEAD lanes, 8 elements each; with QK_NORM a head-wise RMSNorm (Qwen3) comes first.
#pragma once
#include "common.cuh"

constexpr int LANES_PER_HEAD = HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;  // powers of two
constexpr int HEAD_SLOTS = 32 / LANES_PER_HEAD;  // head vectors a warp holds side by side
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 16 up to 256");

// vector: [HEAD_DIM]; weight: [HEAD_DIM] of the head norm; rope: [HEAD_DIM / 2] (cos, sin) of the position.
// All lanes of a warp call it; lanes past HEAD_DIM get zeros.
__device__ __forceinline__ void load_rotated(float* out, const half_t* vector, const half_t* weight, const float2* rope, int part) {
    float own[8] = {}, other[8] = {};
    const int d = 8 * part, half_dim = HEAD_DIM / 2;
    const bool inside = d < HEAD_DIM, first = d < half_dim;
    const int partner = first ? d + half_dim : d - half_dim;
    if (inside) {
        unpack8(load16(vector + d), own);
        unpack8(load16(vector + partner), other);
    }
#if QK_NORM
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += own[j] * own[j];
    const float scale = rsqrtf(group_sum<LANES_PER_HEAD>(squares) / HEAD_DIM + NORM_EPS);
    if (inside) {
#pragma unroll
        for (int j = 0; j < 8; ++j) own[j] *= scale * to_float(weight[d + j]), other[j] *= scale * to_float(weight[partner + j]);
    }
#endif
    if (inside) {
        const float2* angles = rope + (first ? d : partner);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 angle = angles[j];
            out[j] = own[j] * angle.x + (first ? -other[j] : other[j]) * angle.y;
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = 0.f;
    }
}

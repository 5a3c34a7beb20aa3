// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in transformers, for one head vector
// held by LANES_PER_HEAD lanes, 8 elements each; with QK_NORM a head-wise RMSNorm (Qwen3) comes first. The first ROTATED elements are
// rotated, the others pass through.
//
// LONG_ROPE: the table has more rows than positions, because long sequences have other angles at every position (LongRoPE: Ding et
// al. 2024, arXiv 2402.13753). rope_rows: int32 [KV slots], the row of position 0 of the sequence in each slot. It changes between
// kernels only, so that one may read it before the kernel before it ends.
#pragma once
#include "common.cuh"

#ifndef ROTATED
#define ROTATED HEAD_DIM
#endif

#ifndef LONG_ROPE
#define LONG_ROPE 0
#endif

#if LONG_ROPE
#define ROPE_PARAMETERS , const int* rope_rows
#define ROPE_ROW(slot) (int)load4(rope_rows + (slot))
#else
#define ROPE_PARAMETERS
#define ROPE_ROW(slot) 0
#endif

constexpr int LANES_PER_HEAD = HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;  // powers of two
constexpr int HEAD_SLOTS = 32 / LANES_PER_HEAD;  // head vectors a warp holds side by side
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 16 up to 256");
static_assert(ROTATED % 16 == 0 && ROTATED <= HEAD_DIM, "the rotated elements must be a multiple of 16 up to head_dim");

struct Angles {  // (cos, sin) of this lane's 8 elements
    float2 values[8];

    __device__ __forceinline__ void load(const float2* rope, int part) {  // rope: [ROTATED / 2] of the position
        constexpr int HALF = ROTATED > 0 ? ROTATED / 2 : 8;
        const int d = 8 * part, first = d % HALF;
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = d < ROTATED ? rope[first + j] : make_float2(1.f, 0.f);
    }
};

struct HeadVector {  // this lane's 8 elements of a head vector and their partners half of ROTATED away; zeros past the end
    uint4 own, other;

    __device__ __forceinline__ void load(const half_t* vector, int part) {
        const int d = 8 * part;
        own = other = make_uint4(0, 0, 0, 0);
        if (d < HEAD_DIM) {
            own = load16(vector + d);
            other = load16(vector + partner(d));
        }
    }

    static __device__ __forceinline__ int partner(int d) {
        return d >= ROTATED ? d : d < ROTATED / 2 ? d + ROTATED / 2 : d - ROTATED / 2;
    }

    // bias: [HEAD_DIM] of the head.
    __device__ __forceinline__ void add(const half_t* bias, int part) {
        const int d = 8 * part;
        if (d >= HEAD_DIM) return;
        own = sum8(own, *(const uint4*)(bias + d));
        other = sum8(other, *(const uint4*)(bias + partner(d)));
    }

    static __device__ __forceinline__ uint4 sum8(uint4 values, uint4 added) {
        float a[8], b[8];
        unpack8(values, a);
        unpack8(added, b);
#pragma unroll
        for (int j = 0; j < 8; ++j) a[j] += b[j];
        return pack8(a);
    }

    // weight: [HEAD_DIM] of the head norm. All lanes of a warp call it.
    __device__ __forceinline__ void rotate(float* out, const half_t* weight, const Angles& angles, int part) const {
        const int d = 8 * part;
        float a[8], b[8];
        unpack8(own, a);
        unpack8(other, b);
#if QK_NORM
        float squares = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += a[j] * a[j];
        const float scale = rsqrtf(group_sum<LANES_PER_HEAD>(squares) / HEAD_SIZE + NORM_EPS);
        if (d < HEAD_DIM) {
#pragma unroll
            for (int j = 0; j < 8; ++j)
                a[j] *= scale * offset_weight(to_float(weight[d + j])), b[j] *= scale * offset_weight(to_float(weight[partner(d) + j]));
        }
#endif
        const float sign = d < ROTATED / 2 ? -1.f : 1.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = a[j] * angles.values[j].x + sign * b[j] * angles.values[j].y;
    }
};

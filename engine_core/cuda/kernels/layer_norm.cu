// LayerNorm (Ba et al. 2016, arXiv 1607.06450) of ``gridDim.x`` rows: float32 [rows][COLS] to 16 bits. ``params``: float32 [3][COLS],
// weight, bias, and what is added to a row first: the biases of the GEMMs before, which the rows do not have yet.
//
// With MERGE, rows are the patches of a tile, SIDE by SIDE, and the output has MERGE x MERGE neighbours in a row, for each of them COLS
// (pixel shuffle: Shi et al. 2016, arXiv 1609.05158, backwards). Without it the output is [rows][COLS].
#include "common.cuh"

#ifndef MERGE
#define MERGE 0
#define SIDE 1
#endif

constexpr int STEP = THREADS * 4;  // columns of a CTA at once
constexpr int PARTS = (COLS + STEP - 1) / STEP;

// The sum over all threads; ``shared`` is of this call alone.
__device__ __forceinline__ float cta_sum(float value, float* shared) {
    value = group_sum<32>(value);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) total += shared[w];
    return total;
}

__device__ __forceinline__ u64 output_place(int row) {
    if (MERGE == 0) return (u64)row * COLS;
    constexpr int JOINED = MERGE > 0 ? MERGE : 1;
    const int r = row / SIDE, c = row % SIDE;
    const int token = r / JOINED * (SIDE / JOINED) + c / JOINED, place = r % JOINED * JOINED + c % JOINED;
    return (u64)(token * JOINED * JOINED + place) * COLS;
}

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm(const float* rows, const float* params, half_t* output) {
    __shared__ float sums[THREADS / 32], squares[THREADS / 32];
    const u64 start = (u64)blockIdx.x * COLS;
    const int first = threadIdx.x * 4;
    let_next_start();
    wait_for_previous();
    float4 values[PARTS];
    float sum = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = first + p * STEP;
        values[p] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (c >= COLS) continue;
        const float4 v = load16f(rows + start + c), a = *(const float4*)(params + 2 * COLS + c);
        values[p] = make_float4(v.x + a.x, v.y + a.y, v.z + a.z, v.w + a.w);
        sum += values[p].x + values[p].y + values[p].z + values[p].w;
    }
    const float mean = cta_sum(sum, sums) / COLS;
    float square = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        if (first + p * STEP >= COLS) continue;
        float4& v = values[p];
        v = make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean);
        square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float scale = rsqrtf(cta_sum(square, squares) / COLS + NORM_EPS);
    const u64 place = output_place(blockIdx.x);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = first + p * STEP;
        if (c >= COLS) continue;
        const float4 v = values[p], w = *(const float4*)(params + c), b = *(const float4*)(params + COLS + c);
        *(uint2*)(output + place + c) = make_uint2(pack2(v.x * scale * w.x + b.x, v.y * scale * w.y + b.y),
                                                   pack2(v.z * scale * w.z + b.z, v.w * scale * w.w + b.w));
    }
}

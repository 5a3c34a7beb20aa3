// RMSNorm of Q (blockIdx.y 0) and of K (1) over all their heads, in place: rows 16-bit [gridDim.x][ROW_COLS], of which
// the first Q_COLS are Q and the next K_COLS K; weights 16-bit [Q_COLS] and [K_COLS]. The means are over Q_SIZE and K_SIZE values, others being zeros.
#include "common.cuh"

template <int COLS, int SIZE>
__device__ __forceinline__ void norm_part(half_t* row, const half_t* weight) {
    constexpr int STEP = THREADS * 8, PARTS = (COLS + STEP - 1) / STEP;
    __shared__ float sums[THREADS / 32];
    const int first = threadIdx.x * 8;
    uint4 weights[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
        if (first + p * STEP < COLS) weights[p] = *(const uint4*)(weight + first + p * STEP);
    wait_for_previous();
    float values[PARTS][8], squares = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        if (first + p * STEP >= COLS) continue;
        unpack8(load16(row + first + p * STEP), values[p]);
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += values[p][j] * values[p][j];
    }
    squares = group_sum<32>(squares);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) total += sums[w];
    const float scale = rsqrtf(total / SIZE + NORM_EPS);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        if (first + p * STEP >= COLS) continue;
        float w[8];
        unpack8(weights[p], w);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[p][j] *= scale * w[j];
        *(uint4*)(row + first + p * STEP) = pack8(values[p]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) qk_norm(half_t* rows, const half_t* q_norm, const half_t* k_norm) {
    half_t* row = rows + (u64)blockIdx.x * ROW_COLS;
    let_next_start();
    if (blockIdx.y == 0)
        norm_part<Q_COLS, Q_SIZE>(row, q_norm);
    else
        norm_part<K_COLS, K_SIZE>(row + Q_COLS, k_norm);
}

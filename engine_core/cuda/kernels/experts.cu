// Experts: which ones a token gets, and the sum of what they make of it. Their matrices are multiplied by gemv.cu and gemv_packed.cu
// with EXPERTS_PER_TOKEN.
#include "common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr float LEAST = -3.4e38f;  // below every score

// The larger value, of equal ones the one with the lower index; what is no number loses.
__device__ __forceinline__ void take_larger(float& value, int& index, float other, int other_index) {
    if (other > value || (other == value && other_index < index)) value = other, index = other_index;
}

// Of row blockIdx.x of vectors [gridDim.x][COLS], 16-bit: picked and shares [gridDim.x][EXPERTS_PER_TOKEN], the experts whose rows of
// router [EXPERTS][COLS] give the largest products and softmax of those over all experts; with NORM_SHARES over their sum.
extern "C" __global__ void __launch_bounds__(THREADS) route(const half_t* vectors, const half_t* router, int* picked, float* shares) {
    __shared__ float scores[EXPERTS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const half_t* vector = vectors + (u64)blockIdx.x * COLS;
    let_next_start();
    wait_for_previous();
    for (int expert = warp; expert < EXPERTS; expert += WARPS) {
        const half_t* row = router + (u64)expert * COLS;
        float sum = 0.f;
        for (int c = lane * 8; c < COLS; c += 256) {
            float w[8], x[8];
            unpack8(*(const uint4*)(row + c), w);
            unpack8(load16(vector + c), x);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += w[j] * x[j];
        }
        sum = group_sum<32>(sum);
        if (lane == 0) scores[expert] = sum;
    }
    __syncthreads();
    if (warp > 0) return;
    float largest = LEAST, total = 0.f, taken = 0.f, share = 0.f;
    int own = 0;  // lane i keeps the i-th pick
    for (int expert = lane; expert < EXPERTS; expert += 32) largest = fmaxf(largest, scores[expert]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    for (int expert = lane; expert < EXPERTS; expert += 32) total += __expf(scores[expert] - largest);
    total = group_sum<32>(total);
    for (int pick = 0; pick < EXPERTS_PER_TOKEN; ++pick) {
        float best = LEAST;
        int index = min(lane, EXPERTS - 1);
        for (int expert = lane; expert < EXPERTS; expert += 32) take_larger(best, index, scores[expert], expert);
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
            take_larger(best, index, __shfl_xor_sync(0xffffffffu, best, offset), __shfl_xor_sync(0xffffffffu, index, offset));
        index = __shfl_sync(0xffffffffu, index, 0), best = __shfl_sync(0xffffffffu, best, 0);
        const float part = __expf(best - largest) / total;
        taken += part;
        if (lane == pick) own = index, share = part;
        __syncwarp();
        if (lane == 0) scores[index] = LEAST;
        __syncwarp();
    }
    if (lane < EXPERTS_PER_TOKEN) {
        const u64 place = (u64)blockIdx.x * EXPERTS_PER_TOKEN + lane;
        picked[place] = own;
        shares[place] = NORM_SHARES ? share / taken : share;
    }
}

// Row blockIdx.x of sums [gridDim.x][COLS] float32 += shares [gridDim.x][EXPERTS_PER_TOKEN] times made
// [gridDim.x][EXPERTS_PER_TOKEN][COLS], float32.
extern "C" __global__ void __launch_bounds__(THREADS) combine(const float* made, const float* shares, float* sums) {
    const u64 row = blockIdx.x;
    let_next_start();
    wait_for_previous();
    float share[EXPERTS_PER_TOKEN];
#pragma unroll
    for (int k = 0; k < EXPERTS_PER_TOKEN; ++k) share[k] = load4f(shares + row * EXPERTS_PER_TOKEN + k);
    for (int c = threadIdx.x * 4; c < COLS; c += THREADS * 4) {
        float4 total = load16f(sums + row * COLS + c);
#pragma unroll
        for (int k = 0; k < EXPERTS_PER_TOKEN; ++k) {
            const float4 v = load16f(made + (row * EXPERTS_PER_TOKEN + k) * COLS + c);
            total.x += share[k] * v.x, total.y += share[k] * v.y, total.z += share[k] * v.z, total.w += share[k] * v.w;
        }
        *(float4*)(sums + row * COLS + c) = total;
    }
}

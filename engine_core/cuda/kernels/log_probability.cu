// The natural logarithm of a token's probability: of the softmax over float32 logits [ROWS], by one CTA, in one pass with a running
// maximum (Milakov & Gimelshein 2018, arXiv 1805.02867). output[place] becomes that of row ``row``, -infinity if it is negative: a
// token that the LM head lacks. A logit that is no number makes it one that is none.
#include "common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr float LOWEST = -1e30f;  // stands for -infinity without its NaNs

struct Sum {  // of exp(x - peak)
    float peak, sum;

    __device__ __forceinline__ void add(const Sum& other) {
        const float top = fmaxf(peak, other.peak);
        sum = sum * expf(peak - top) + other.sum * expf(other.peak - top);
        peak = top;
    }

    __device__ __forceinline__ void add(const float4& x) {
        const float top = fmaxf(fmaxf(peak, fmaxf(x.x, x.y)), fmaxf(x.z, x.w));
        sum = sum * expf(peak - top) + (expf(x.x - top) + expf(x.y - top)) + (expf(x.z - top) + expf(x.w - top));
        peak = top;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) log_probability(const float* logits, int row, int place, float* output) {
    __shared__ Sum sums[WARPS];
    let_next_start();
    wait_for_previous();
    Sum own = {LOWEST, 0.f};
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i + 3 < ROWS; i += 4 * THREADS) own.add(load16f(logits + i));
    if (const int i = ROWS / 4 * 4 + threadIdx.x; i < ROWS) own.add(Sum{load4f(logits + i), 1.f});
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const Sum other = {__shfl_xor_sync(0xffffffffu, own.peak, offset), __shfl_xor_sync(0xffffffffu, own.sum, offset)};
        own.add(other);
    }
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < WARPS; ++w) own.add(sums[w]);
    output[place] = row < 0 ? __uint_as_float(0xff800000u) : load4f(logits + row) - own.peak - logf(own.sum);
}

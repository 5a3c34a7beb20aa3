// RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) of ``gridDim.x`` rows: float32 [rows][COLS] to 16-bit [rows][COLS].
// With ADD the 16-bit ``delta`` [rows][COLS] is added to the rows first, which keep the sum.
#include "common.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(float* rows, const half_t* weight, half_t* output, const half_t* delta) {
    __shared__ float sums[THREADS / 32];
    float* row = rows + (u64)blockIdx.x * COLS;
    float squares = 0.f;
    for (int c = threadIdx.x * 4; c < COLS; c += THREADS * 4) {
        float4 v = load16f(row + c);
        if (ADD) {
            const uint2 d = *(const uint2*)(delta + (u64)blockIdx.x * COLS + c);
            const float2 a = unpack2(d.x), b = unpack2(d.y);
            v = make_float4(v.x + a.x, v.y + a.y, v.z + b.x, v.w + b.y);
            *(float4*)(row + c) = v;  // read again below by this thread alone
        }
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    squares = group_sum<32>(squares);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.f;
    for (int w = 0; w < THREADS / 32; ++w) total += sums[w];
    const float scale = rsqrtf(total / COLS + NORM_EPS);
    for (int c = threadIdx.x * 4; c < COLS; c += THREADS * 4) {
        const float4 v = load16f(row + c);
        const uint2 w = *(const uint2*)(weight + c);
        const float2 a = unpack2(w.x), b = unpack2(w.y);
        *(uint2*)(output + (u64)blockIdx.x * COLS + c) =
            make_uint2(pack2(v.x * scale * a.x, v.y * scale * a.y), pack2(v.z * scale * b.x, v.w * scale * b.y));
    }
}

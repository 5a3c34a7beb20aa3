// RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) of ``gridDim.x`` rows: float32 [rows][COLS] to 16-bit [rows][COLS].
// With ADD the 16-bit ``delta`` [rows][COLS] is added to the rows first, which keep the sum. With RESIDUAL the output is float32 and
// added to; with ROUNDED the sum goes to ``rounded``, 16-bit [rows][COLS], too. With ORDERED a 16-bit output has column c at
// places[c], int32 [COLS]. With QUANTIZED the output is fp8, with a float32 scale for each row (fp8_rows.cuh).
#include "fp8_rows.cuh"

#ifndef RESIDUAL
#define RESIDUAL 0
#endif

#ifndef ROUNDED
#define ROUNDED 0
#endif

#ifndef QUANTIZED
#define QUANTIZED 0
#endif

constexpr int STEP = THREADS * 4;  // columns of a CTA at once
constexpr int PARTS = (COLS + STEP - 1) / STEP;

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(float* rows, const half_t* weight, void* output, const half_t* delta
#if ROUNDED
                                                               , half_t* rounded
#endif
#if QUANTIZED
                                                               , float* scales
#endif
                                                               PLACES_PARAMETER) {
    __shared__ float sums[THREADS / 32];
    const u64 start = (u64)blockIdx.x * COLS;
    const int first = threadIdx.x * 4;
    uint2 weights[PARTS];
#if ORDERED
    int4 own_places[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
        if (first + p * STEP < COLS) own_places[p] = *(const int4*)(places + first + p * STEP);
#endif
    let_next_start();
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
        if (first + p * STEP < COLS) weights[p] = *(const uint2*)(weight + first + p * STEP);
    wait_for_previous();
    float4 values[PARTS];
    float squares = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = first + p * STEP;
        if (c >= COLS) continue;
        float4 v = load16f(rows + start + c);
        if (ADD) {
            const uint2 d = load8(delta + start + c);
            const float2 a = unpack2(d.x), b = unpack2(d.y);
            v = make_float4(v.x + a.x, v.y + a.y, v.z + b.x, v.w + b.y);
            *(float4*)(rows + start + c) = v;
        }
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        values[p] = v;
    }
    squares = group_sum<32>(squares);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) total += sums[w];
    const float scale = rsqrtf(total / NORM_SIZE + NORM_EPS);
#if QUANTIZED
    float peak = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        if (first + p * STEP >= COLS) continue;
        float4& v = values[p];
        const float2 a = unpack2(weights[p].x), b = unpack2(weights[p].y);
        v.x *= scale * offset_weight(a.x), v.y *= scale * offset_weight(a.y);
        v.z *= scale * offset_weight(b.x), v.w *= scale * offset_weight(b.y);
        peak = fmaxf(fmaxf(peak, fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w)));
    }
    const float factor = quantizer<THREADS>(peak, scales + blockIdx.x);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const float4 v = values[p];
        const u32 codes = to_e4m3x4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
        if (first + p * STEP < COLS) *(u32*)((unsigned char*)output + start + first + p * STEP) = codes;
    }
#else
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = first + p * STEP;
        if (c >= COLS) continue;
        const float4 v = values[p];
        const float2 a = unpack2(weights[p].x), b = unpack2(weights[p].y);
        const float x = v.x * scale * offset_weight(a.x), y = v.y * scale * offset_weight(a.y);
        const float z = v.z * scale * offset_weight(b.x), w = v.w * scale * offset_weight(b.y);
#if RESIDUAL
        float* sum = (float*)output + start + c;
        const float4 before = load16f(sum);
        const float4 after = make_float4(before.x + x, before.y + y, before.z + z, before.w + w);
        *(float4*)sum = after;
#if ROUNDED
        *(uint2*)(rounded + start + c) = make_uint2(pack2(after.x, after.y), pack2(after.z, after.w));
#endif
#elif ORDERED
        half_t* row = (half_t*)output + start;
        row[own_places[p].x] = to_half(x), row[own_places[p].y] = to_half(y);
        row[own_places[p].z] = to_half(z), row[own_places[p].w] = to_half(w);
#else
        *(uint2*)((half_t*)output + start + c) = make_uint2(pack2(x, y), pack2(z, w));
#endif
    }
#endif
}

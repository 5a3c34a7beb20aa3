// Rows of activations to fp8 (fp8_rows.cuh), a CTA for each: 16-bit [gridDim.x][COLS], or with GATED those that the gated activation
// makes of [gridDim.x][COLS] (gate, up). A row passes through registers once.
#include "fp8_rows.cuh"

#ifndef GELU
#define GELU 0
#endif

constexpr int STEP = THREADS * 8;  // columns of a CTA at once
constexpr int PARTS = (COLS + STEP - 1) / STEP;
static_assert(COLS % 8 == 0, "unsupported shape");

extern "C" __global__ void __launch_bounds__(THREADS) quantize_rows(const half_t* rows, unsigned char* codes, float* scales) {
    const u64 row = blockIdx.x;
    const int first = threadIdx.x * 8;
    let_next_start();
    wait_for_previous();
    float v[PARTS][8], peak = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = first + p * STEP;
        if (c >= COLS) continue;
#if GATED
        const half_t* source = rows + (row * COLS + c) * 2;
        float pairs[16];
        unpack8(load16(source), pairs);
        unpack8(load16(source + 8), pairs + 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[p][j] = gated<GELU>(pairs[2 * j], pairs[2 * j + 1]);
#else
        unpack8(load16(rows + row * COLS + c), v[p]);
#endif
#pragma unroll
        for (int j = 0; j < 8; ++j) peak = fmaxf(peak, fabsf(v[p][j]));
    }
    const float factor = quantizer<THREADS>(peak, scales + row);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = first + p * STEP;
        if (c >= COLS) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) v[p][j] *= factor;
        const u32 low = to_e4m3x4(v[p][0], v[p][1], v[p][2], v[p][3]), high = to_e4m3x4(v[p][4], v[p][5], v[p][6], v[p][7]);
        *(uint2*)(codes + row * COLS + c) = make_uint2(low, high);
    }
}

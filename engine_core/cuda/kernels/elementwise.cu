// The small kernels around the matrix multiplications: embedding, activations, bias, the last row of a chunk.
#include "common.cuh"

#ifndef TOKEN_STRIDE
#define TOKEN_STRIDE 1
#endif

#ifndef EMBEDDING_SCALE
#define EMBEDDING_SCALE 1.f
#endif

#ifndef GELU
#define GELU 0
#endif

#ifndef FLOAT_VALUES
#define FLOAT_VALUES 0
#endif

#ifndef ROUNDED
#define ROUNDED 0
#endif

#ifndef FEATURES
#define FEATURES 0
#endif

#ifndef ERF
#define ERF 0
#endif

// float32 [gridDim.x][COLS], EMBEDDING_SCALE times the rows of table [vocab][COLS] named by tokens, TOKEN_STRIDE ints apart; a failed
// step's token reads row 0. With ROUNDED the same goes to ``rounded``, 16-bit. With FEATURES, the rows of the table, a token beyond them
// stands for a row of ``features``, float32 [rows][COLS], as it is.
extern "C" __global__ void __launch_bounds__(THREADS) embed(const half_t* table, const int* tokens, float* output
#if ROUNDED
                                                            , half_t* rounded
#endif
#if FEATURES
                                                            , const float* features
#endif
) {
    // The next kernel is not let in early: it gains nothing from a kernel so short.
    const int token = max(0, (int)load4(tokens + blockIdx.x * TOKEN_STRIDE));
    for (int c = threadIdx.x * 8; c < COLS; c += THREADS * 8) {
        float v[8];
#if FEATURES
        if (token >= FEATURES) {
            const float* x = features + (u64)(token - FEATURES) * COLS + c;
            const float4 low = load16f(x), high = load16f(x + 4);
            v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        } else
#endif
        {
            unpack8(*(const uint4*)(table + (u64)token * COLS + c), v);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] *= EMBEDDING_SCALE;
        }
        float4* y = (float4*)(output + (u64)blockIdx.x * COLS + c);
        y[0] = make_float4(v[0], v[1], v[2], v[3]);
        y[1] = make_float4(v[4], v[5], v[6], v[7]);
#if ROUNDED
        *(uint4*)(rounded + (u64)blockIdx.x * COLS + c) = pack8(v);
#endif
    }
}

// 16-bit [gridDim.x][COLS] from [gridDim.x][COLS] (gate, up).
extern "C" __global__ void __launch_bounds__(THREADS) gate_multiply(const u32* gate_up, half_t* output) {
    const u64 row = (u64)blockIdx.x * COLS;
    let_next_start();
    wait_for_previous();
    for (int c = blockIdx.y * THREADS + threadIdx.x; c < COLS; c += gridDim.y * THREADS) {
        const float2 v = unpack2(load4(gate_up + row + c));
        output[row + c] = to_half(gated<GELU>(v.x, v.y));
    }
}

// [gridDim.x][COLS], 16-bit or with FLOAT_VALUES float32, += bias [COLS], 16-bit.
extern "C" __global__ void __launch_bounds__(THREADS) add_bias(void* values, const half_t* bias) {
    const u64 row = (u64)blockIdx.x * COLS;
    let_next_start();
    wait_for_previous();
    for (int c = threadIdx.x; c < COLS; c += THREADS) {
#if FLOAT_VALUES
        ((float*)values)[row + c] = load4f((const float*)values + row + c) + to_float(bias[c]);
#else
        half_t* value = (half_t*)values + row + c;
        *value = to_half(to_float(*value) + to_float(bias[c]));
#endif
    }
}

// 16-bit [gridDim.x][COLS] ← gelu of it and bias [COLS]: the approximation by tanh, or with ERF the exact one.
extern "C" __global__ void __launch_bounds__(THREADS) bias_gelu(half_t* values, const half_t* bias) {
    const u64 row = (u64)blockIdx.x * COLS;
    let_next_start();
    wait_for_previous();
    for (int c = (blockIdx.y * THREADS + threadIdx.x) * 8; c < COLS; c += gridDim.y * THREADS * 8) {
        float v[8], b[8];
        unpack8(load16(values + row + c), v);
        unpack8(*(const uint4*)(bias + c), b);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float x = v[j] + b[j];
            v[j] = ERF ? 0.5f * x * (1.f + erff(x * 0.70710678f)) : gated<true>(x, 1.f);
        }
        *(uint4*)(values + row + c) = pack8(v);
    }
}

// The first of rows of COLS * 16 bytes becomes that of the chunk's last token.
extern "C" __global__ void __launch_bounds__(THREADS) keep_last_row(uint4* rows, const Chunk* chunk) {
    const u64 last = (u64)(load_chunk(chunk).count - 1) * COLS;
    let_next_start();
    wait_for_previous();
    for (int c = blockIdx.x * THREADS + threadIdx.x; c < COLS; c += gridDim.x * THREADS) rows[c] = load16(rows + last + c);
}

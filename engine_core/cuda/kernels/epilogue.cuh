// What a GEMV kernel does with the sum of a row.
//
// EPILOGUE 0: y 16-bit; 1: y float32, added to (the residual stream); 2: rows are (gate, up) pairs and y[i] = silu(gate) * up, 16-bit;
// 3: y float32, the logits or what is normed before it is added; 4: as 2, with gelu. With BIAS a bias is added to the sum first, with
// LORA_RANK an adapter's term; see lora_gemv.cuh. TOKENS vectors have rows of y one after the other.
#pragma once
#include "lora_gemv.cuh"

#ifndef TOKENS
#define TOKENS 1
#endif
#define GATED (EPILOGUE == 2 || EPILOGUE == 4)
constexpr int GRAIN = GATED ? 2 : 1;  // rows that stay together

// What finish adds to a row's sum, read while the sums are still being made. place: of the row in y.
__device__ __forceinline__ float read_start(int row, u64 place, const half_t* bias, const void* output) {
#if EPILOGUE == 1 && BIAS
    return load4f((const float*)output + place) + to_float(bias[row]);
#elif EPILOGUE == 1
    return load4f((const float*)output + place);
#elif BIAS
    return to_float(bias[row]);
#else
    return 0.f;
#endif
}

// next: the sum of row + 1, where rows come in pairs, and then both have their bias already.
__device__ __forceinline__ void finish(float sum, float next, float start, u64 place, void* output) {
#if EPILOGUE == 0
    ((half_t*)output)[place] = to_half(start + sum);
#elif EPILOGUE == 1
    ((float*)output)[place] = start + sum;
#elif GATED
    ((half_t*)output)[place / 2] = to_half(gated<EPILOGUE == 4>(sum, next));
#else
    ((float*)output)[place] = to_logit(BIAS ? start + sum : sum);
#endif
}

// The rows of a segment that this thread finishes: GRAIN of every STEP, those of the first vector before those of the next one.
template <int SEGMENT, int THREADS>
struct Segment {
    static constexpr int STEP = THREADS * GRAIN, STARTS = (SEGMENT * TOKENS + STEP - 1) / STEP;
    float starts[STARTS];
#if GATED && BIAS
    float next_starts[STARTS];
#endif

    static __device__ __forceinline__ int token(int i) { return TOKENS == 1 ? 0 : (i * STEP + threadIdx.x * GRAIN) / SEGMENT; }
    static __device__ __forceinline__ int local(int i) { return i * STEP + threadIdx.x * GRAIN - token(i) * SEGMENT; }
    static __device__ __forceinline__ bool has(int i, int count) { return token(i) < TOKENS && local(i) < min(count, SEGMENT); }
    static __device__ __forceinline__ u64 place(int i, int first) { return (u64)token(i) * ROWS + first + local(i); }

    // first: the segment's first row; count: how many rows it has.
    __device__ __forceinline__ void begin(int first, int count, const half_t* bias, const void* output) {
#pragma unroll
        for (int i = 0; i < STARTS; ++i) {
            const int row = first + local(i);
            starts[i] = has(i, count) ? read_start(row, place(i, first), bias, output) : 0.f;
#if GATED && BIAS
            next_starts[i] = has(i, count) ? read_start(row + 1, place(i, first) + 1, bias, output) : 0.f;
#endif
        }
    }

    // sums: [TOKENS][K_WARPS][SEGMENT]; lora_terms: see LoraTerms.
    __device__ __forceinline__ void end(int first, int count, const float (*sums)[SEGMENT], float scale, void* output,
                                        const GemvLora& lora, const float* lora_terms) const {
#pragma unroll
        for (int i = 0; i < STARTS; ++i) {
            if (!has(i, count)) {
                if (TOKENS == 1) break;
                continue;
            }
            const float(*own)[SEGMENT] = sums + token(i) * K_WARPS;
            float sum = 0.f, next = 0.f;
#pragma unroll
            for (int k = 0; k < K_WARPS; ++k) {
                sum += own[k][local(i)];
                if (GRAIN == 2) next += own[k][local(i) + 1];
            }
            sum *= scale, next *= scale;
#if LORA_RANK > 0
            if (lora.adapter >= 0) {
                sum += lora_terms[local(i)];
                if (GRAIN == 2) next += lora_terms[local(i) + 1];
            }
#endif
#if GATED && BIAS
            sum += starts[i], next += next_starts[i];
#endif
            finish(sum, next, starts[i], place(i, first), output);
        }
    }
};

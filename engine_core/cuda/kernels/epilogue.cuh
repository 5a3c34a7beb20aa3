// What a GEMV kernel does with the sum of a row.
//
// EPILOGUE 0: y 16-bit; 1: y float32, added to (the residual stream); 2: rows are (gate, up) pairs and y[i] = silu(gate) * up, 16-bit;
// 3: y float32, the logits or what is normed before it is added; 4: as 2, with gelu. With BIAS a bias is added to the sum first, with
// LORA_RANK an adapter's term; see lora_gemv.cuh.
#pragma once
#include "lora_gemv.cuh"

#define GATED (EPILOGUE == 2 || EPILOGUE == 4)
constexpr int GRAIN = GATED ? 2 : 1;  // rows that stay together

// What finish adds to a row's sum, read while the sums are still being made.
__device__ __forceinline__ float read_start(int row, const half_t* bias, const void* output) {
#if EPILOGUE == 1 && BIAS
    return load4f((const float*)output + row) + to_float(bias[row]);
#elif EPILOGUE == 1
    return load4f((const float*)output + row);
#elif BIAS
    return to_float(bias[row]);
#else
    return 0.f;
#endif
}

// next: the sum of row + 1, where rows come in pairs, and then both have their bias already.
__device__ __forceinline__ void finish(float sum, float next, float start, int row, void* output) {
#if EPILOGUE == 0
    ((half_t*)output)[row] = to_half(start + sum);
#elif EPILOGUE == 1
    ((float*)output)[row] = start + sum;
#elif GATED
    ((half_t*)output)[row / 2] = to_half(gated<EPILOGUE == 4>(sum, next));
#else
    ((float*)output)[row] = to_logit(BIAS ? start + sum : sum);
#endif
}

// The rows of a segment that this thread finishes: GRAIN of every STEP.
template <int SEGMENT, int THREADS>
struct Segment {
    static constexpr int STEP = THREADS * GRAIN, STARTS = (SEGMENT + STEP - 1) / STEP;
    float starts[STARTS];
#if GATED && BIAS
    float next_starts[STARTS];
#endif

    // first: the segment's first row; count: how many rows it has.
    __device__ __forceinline__ void begin(int first, int count, const half_t* bias, const void* output) {
#pragma unroll
        for (int i = 0; i < STARTS; ++i) {
            const int local = i * STEP + threadIdx.x * GRAIN;
            starts[i] = local < min(count, SEGMENT) ? read_start(first + local, bias, output) : 0.f;
#if GATED && BIAS
            next_starts[i] = local < min(count, SEGMENT) ? read_start(first + local + 1, bias, output) : 0.f;
#endif
        }
    }

    // sums: [K_WARPS][SEGMENT]; lora_terms: see LoraTerms.
    __device__ __forceinline__ void end(int first, int count, const float (*sums)[SEGMENT], float scale, void* output,
                                        const GemvLora& lora, const float* lora_terms) const {
#pragma unroll
        for (int i = 0; i < STARTS; ++i) {
            const int local = i * STEP + threadIdx.x * GRAIN;
            if (local >= min(count, SEGMENT)) break;
            float sum = 0.f, next = 0.f;
#pragma unroll
            for (int k = 0; k < K_WARPS; ++k) {
                sum += sums[k][local];
                if (GRAIN == 2) next += sums[k][local + 1];
            }
            sum *= scale, next *= scale;
#if LORA_RANK > 0
            if (lora.adapter >= 0) {
                sum += lora_terms[local];
                if (GRAIN == 2) next += lora_terms[local + 1];
            }
#endif
#if GATED && BIAS
            sum += starts[i], next += next_starts[i];
#endif
            finish(sum, next, starts[i], first + local, output);
        }
    }
};

// What becomes of a row's sum in a matrix-vector product.
//
// EPILOGUE 0: y 16-bit, plus bias with BIAS; 1: y float32 +=, the residual stream; 2: rows are (gate, up) pairs and
// y[i] = silu(gate) * up, 16-bit; 3: y float32, the logits.
#pragma once
#include "common.cuh"

constexpr int GRAIN = EPILOGUE == 2 ? 2 : 1;  // rows that stay together

// next: the sum of row + 1, where rows come in pairs.
__device__ __forceinline__ void finish(float sum, float next, int row, const half_t* bias, void* output) {
#if EPILOGUE == 0
#if BIAS
    sum += to_float(bias[row]);
#endif
    ((half_t*)output)[row] = to_half(sum);
#elif EPILOGUE == 1
    float* y = (float*)output + row;
    *y = load4f(y) + sum;
#elif EPILOGUE == 2
    ((half_t*)output)[row / 2] = to_half(sum / (1.f + __expf(-sum)) * next);
#else
    ((float*)output)[row] = sum;
#endif
}

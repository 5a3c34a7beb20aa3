// With EXPERTS_PER_TOKEN a GEMV multiplies one of a stack of matrices [ROWS][COLS] for each expert that a token was given: blockIdx.x
// is the token, blockIdx.y which of its experts, and the CTAs of one product are along z. picked: [tokens][EXPERTS_PER_TOKEN]. The
// vectors are [tokens][COLS], with EXPERT_VECTORS [tokens][EXPERTS_PER_TOKEN][COLS]; outputs are in the latter order.
#pragma once

#ifdef EXPERTS_PER_TOKEN
#define EXPERT_PARAMETERS , const int* picked
#define CTA blockIdx.z
#define CTAS gridDim.z

// stride: bytes from one expert's weights to the next one's.
template <typename Weight>
__device__ __forceinline__ void find_expert(const int* picked, const Weight*& weight, u64 stride, const void*& input, void*& output) {
    const u64 pair = (u64)blockIdx.x * EXPERTS_PER_TOKEN + blockIdx.y;
    wait_for_previous();
    weight = (const Weight*)((const char*)weight + (u64)load4(picked + pair) * stride);
    input = (const half_t*)input + (EXPERT_VECTORS ? pair : (u64)blockIdx.x) * COLS;
    output = (char*)output + pair * (ROWS / GRAIN) * (EPILOGUE == 3 ? 4 : 2);
}
#else
#define EXPERT_PARAMETERS
#define CTA blockIdx.x
#define CTAS gridDim.x
#endif

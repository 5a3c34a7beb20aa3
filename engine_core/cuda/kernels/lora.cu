// LoRA adapters (Hu et al. 2021, arXiv 2106.09685): y += B (A x), in two halves. A GEMV makes both itself (lora_gemv.cuh).
//
// lora_shrink: sums = A x of one token each of several sequences; the GEMM of the matrix itself multiplies them by B (lora.cuh).
// lora_shrink_chunk and lora_expand_chunk: both halves for the tokens of a prompt's chunk, after its GEMM.
//
// a: 16-bit [adapters][LORA_PARTS * LORA_RANK][COLS]; b and sums: see lora.cuh. A row without an adapter is left alone.
#include "lora.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int STEP = 8 * THREADS, PIECES = (COLS + STEP - 1) / STEP;  // of 8 columns, that a thread has
static_assert(COLS % 8 == 0, "unsupported shape");

// The fourth number of a chunk is its sequence's adapter.
__device__ __forceinline__ int load_adapter(const Chunk* chunk) { return (int)load4((const int*)chunk + 3); }

// Grid: (LORA_SUMS, tokens); a CTA makes one sum. input: 16-bit [tokens][COLS].
extern "C" __global__ void __launch_bounds__(THREADS)
    lora_shrink(const half_t* a, const half_t* input, const int* adapters, float* sums) {
    __shared__ float dots[WARPS];
    const int row = blockIdx.x, token = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    let_next_start();
    const int adapter = (int)load4(adapters + token);  // uploaded before the step
    const bool works = adapter >= 0;
    uint4 weights[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int c = p * STEP + 8 * threadIdx.x;
        if (works && c < COLS) weights[p] = *(const uint4*)(a + ((u64)adapter * LORA_SUMS + row) * COLS + c);
    }
    wait_for_previous();
    if (!works) return;
    float dot = 0.f;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int c = p * STEP + 8 * threadIdx.x;
        if (c >= COLS) continue;
        float w[8], x[8];
        unpack8(weights[p], w);
        unpack8(load16(input + (u64)token * COLS + c), x);
#pragma unroll
        for (int j = 0; j < 8; ++j) dot += w[j] * x[j];
    }
    dot = group_sum<32>(dot);
    if (lane == 0) dots[warp] = dot;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += dots[w];
        sums[(u64)token * LORA_SUMS + row] = total;
    }
}

// Grid: (tiles of TOKENS, WARPS sums each). input: 16-bit [tokens][COLS].
extern "C" __global__ void __launch_bounds__(THREADS)
    lora_shrink_chunk(const half_t* a, const half_t* input, const Chunk* chunk, float* sums) {
    constexpr int SPAN = 512, EIGHTS = SPAN / 8;  // columns in shared memory
    __shared__ uint4 x[TOKENS][EIGHTS];
    const int lane = threadIdx.x % 32, row = blockIdx.y * WARPS + threadIdx.x / 32, first = blockIdx.x * TOKENS;
    const int adapter = load_adapter(chunk), count = load_chunk(chunk).count;
    let_next_start();
    wait_for_previous();
    if (adapter < 0 || first >= count) return;
    const half_t* weights = a + ((u64)adapter * LORA_SUMS + min(row, LORA_SUMS - 1)) * COLS;
    float dots[TOKENS] = {};
    for (int start = 0; start < COLS; start += SPAN) {
        __syncthreads();
        for (int i = threadIdx.x; i < TOKENS * EIGHTS; i += THREADS) {
            const int token = first + i / EIGHTS, c = start + i % EIGHTS * 8;
            const bool inside = token < count && c < COLS;
            x[i / EIGHTS][i % EIGHTS] = inside ? load16(input + (u64)token * COLS + c) : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
#pragma unroll
        for (int eight = lane; eight < EIGHTS; eight += 32) {
            if (start + 8 * eight >= COLS) break;
            float w[8];
            unpack8(*(const uint4*)(weights + start + 8 * eight), w);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                float v[8];
                unpack8(x[t][eight], v);
#pragma unroll
                for (int j = 0; j < 8; ++j) dots[t] += w[j] * v[j];
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const float dot = group_sum<32>(dots[t]);
        if (lane == 0 && row < LORA_SUMS && first + t < count) sums[(u64)(first + t) * LORA_SUMS + row] = dot;
    }
}

// Grid: (tiles of TOKENS, THREADS rows each). output [tokens][ROWS], added to: float32 with FLOAT_OUTPUT, else 16-bit.
extern "C" __global__ void __launch_bounds__(THREADS)
    lora_expand_chunk(const half_t* b, const float* sums, const Chunk* chunk, void* output) {
    __shared__ float4 own[TOKENS][LORA_SUMS / 4];
    const int row = blockIdx.y * THREADS + threadIdx.x, first = blockIdx.x * TOKENS;
    const int adapter = load_adapter(chunk), count = load_chunk(chunk).count;
    let_next_start();
    wait_for_previous();
    if (adapter < 0 || first >= count) return;
    for (int i = threadIdx.x; i < TOKENS * (LORA_SUMS / 4); i += THREADS) {
        const int token = first + i / (LORA_SUMS / 4);
        const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
        own[i / (LORA_SUMS / 4)][i % (LORA_SUMS / 4)] = token < count ? load16f(sums + (u64)token * LORA_SUMS + i % (LORA_SUMS / 4) * 4) : zero;
    }
    __syncthreads();
    if (row >= ROWS) return;
    const half_t* weights = b + ((u64)adapter * ROWS + row) * LORA_RANK;
    const int part = lora_part(row) * (LORA_RANK / 4);
    float added[TOKENS] = {};
    for (int r = 0; r < LORA_RANK; r += 8) {
        const uint4 w = *(const uint4*)(weights + r);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) added[t] += lora_dot(w, own[t][part + r / 4], own[t][part + r / 4 + 1]);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (first + t >= count) break;
        const u64 place = (u64)(first + t) * ROWS + row;
#if FLOAT_OUTPUT
        ((float*)output)[place] = load4f((const float*)output + place) + added[t];
#else
        ((half_t*)output)[place] = to_half(to_float(((const half_t*)output)[place]) + added[t]);
#endif
    }
}

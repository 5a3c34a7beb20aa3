// Appends the keys and values of all layers that a TensorRT engine computed for ``count`` tokens to the linear cache
// [LAYERS][2][KV_HEADS][CONTEXT][head_dim]. After a decode step it also copies the sampler's token and position to where the engine
// reads the next step's. fresh: [LAYERS][2] of FRESH vectors, each [count][KV_HEADS][VECTORS]; a vector is 16 bytes. LAYERS is 0
// where the engine writes its cache itself.
#include "common.cuh"

// start: position of the first token, or null after a decode step: the one before the sampler's. state: the sampler's, or
// null where no decode step follows. next_index may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_append(const uint4* fresh, uint4* cache, const int* start, int count, const State* state, int* next_token, int* next_position,
              u64* next_index) {
    const int position = start ? *start : state->position - 1;
#if LAYERS > 0
    const u32 total = 2u * LAYERS * count * KV_HEADS * VECTORS;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < total; i += gridDim.x * THREADS) {
        const u32 vector = i % VECTORS, head = i / VECTORS % KV_HEADS;
        const u32 token = i / (VECTORS * KV_HEADS) % count, part = i / (VECTORS * KV_HEADS) / count;
        if (position + token >= CONTEXT) continue;
        const uint4 value = fresh[(u64)part * FRESH + (token * KV_HEADS + head) * VECTORS + vector];
        cache[(((u64)part * KV_HEADS + head) * CONTEXT + position + token) * VECTORS + vector] = value;
    }
#endif
    if (state && blockIdx.x == 0 && threadIdx.x == 0) {
        *next_token = max(0, state->token);  // a failed step's token is none; its successors are not looked at
        *next_position = min(state->position, CONTEXT - 1);
        if (next_index) *next_index = min(state->position, CONTEXT - 1);
    }
}

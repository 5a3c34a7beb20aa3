// Prefill: rotates q in place, but with KV_ONLY, and writes the rotated K and the V of the chunk's tokens into the linear KV cache.
// qkv: [tokens][(HEADS + 2 KV_HEADS) HEAD_DIM]; cache, rope and scales are as in attention_decode.cu. LANES_PER_HEAD lanes hold one
// head vector. With BIAS, ``bias`` [(HEADS + 2 KV_HEADS) HEAD_DIM] is added to q, k and v first.
#include "rope.cuh"
#if KV_INT8
#include "kv_int8.cuh"
#endif

#ifndef KV_ONLY
#define KV_ONLY 0
#endif

#ifndef BIAS
#define BIAS 0
#endif
constexpr int ALL_HEADS = HEADS + 2 * KV_HEADS, FIRST_HEAD = KV_ONLY ? HEADS : 0, OWN_HEADS = ALL_HEADS - FIRST_HEAD;

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_append(half_t* qkv, item_t* cache, const float2* rope, const half_t* q_norm, const half_t* k_norm, const Chunk* chunk,
                half_t* scales
#if BIAS
                , const half_t* bias
#endif
                ROPE_PARAMETERS) {
    const int lane = threadIdx.x % 32, part = lane % LANES_PER_HEAD, d = 8 * part;
    const int index = ((blockIdx.x * THREADS + threadIdx.x) / 32) * HEAD_SLOTS + lane / LANES_PER_HEAD;
    const auto [position, count] = load_chunk(chunk);
    cache += load_slot(chunk) * (u64)SLOT_STRIDE;
    if (KV_INT8) scales += load_slot(chunk) * (u64)SCALE_SLOT_STRIDE;
    const bool inside = index < count * OWN_HEADS;
    const int token = inside ? index / OWN_HEADS : 0, head = FIRST_HEAD + (inside ? index % OWN_HEADS : 0);
    half_t* vector = qkv + ((u64)token * ALL_HEADS + head) * HEAD_DIM;
    const float2* angles = rope + (u64)(ROPE_ROW(load_slot(chunk)) + position + token) * (ROTATED / 2);
    HeadVector raw;
    Angles lane_angles;
    let_next_start();
    lane_angles.load(angles, part);
    wait_for_previous();
    raw.load(vector, part);
#if BIAS
    raw.add(bias + head * HEAD_DIM, part);
#endif
    float rotated[8];
    raw.rotate(rotated, head < HEADS ? q_norm : k_norm, lane_angles, part);
#if KV_INT8
    const bool is_value = head >= HEADS + KV_HEADS;
    float kept[8];
    unpack8(raw.own, kept);
#pragma unroll
    for (int j = 0; j < 8; ++j) kept[j] = is_value ? kept[j] : rotated[j];
    half_t scale;
    const uint2 quantized = quantize<LANES_PER_HEAD>(kept, scale);
#endif
    __syncwarp();  // every lane has read before one writes
    if (!inside || d >= HEAD_DIM) return;
    if (head < HEADS) {
        *(uint4*)(vector + d) = pack8(rotated);
        return;
    }
    const int row = head - HEADS;  // K heads, then V heads, as in the cache
#if KV_INT8
    *(uint2*)(cache + ((u64)row * CONTEXT + position + token) * HEAD_DIM + d) = quantized;
    if (part == 0) scales[(u64)row * SCALE_PITCH + position + token] = scale;
#else
    const bool is_value = head >= HEADS + KV_HEADS;
    *(uint4*)(cache + ((u64)row * CONTEXT + position + token) * HEAD_DIM + d) = is_value ? raw.own : pack8(rotated);
#endif
}

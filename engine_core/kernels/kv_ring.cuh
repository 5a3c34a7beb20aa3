// How attention_decode.cu reads the KV cache: through a ring of DEPTH stages in shared memory, filled by asynchronous copies.
// Of each stage a slot of LANES_PER_HEAD lanes gets UNROLL keys; a lane gets 8 elements of each. Lanes past HEAD_DIM and keys
// past the end read as zeros.
#pragma once
#include "rope.cuh"
#if KV_INT8
#include "kv_int8.cuh"
#endif

#if !KV_INT8

constexpr int UNROLL = 2;
constexpr int STAGE_KEYS = UNROLL * WARPS * HEAD_SLOTS;
typedef uint4 Piece;  // 8 elements of a cached vector

__device__ __forceinline__ void unpack_piece(Piece v, float* f) { unpack8(v, f); }

// Each lane copies its own pieces through its own slots, so that no barrier is needed.
struct Ring {  // uint4 [DEPTH][UNROLL][K, V][THREADS]
    static constexpr int STRIDE = WARPS * HEAD_SLOTS;  // keys between two of a slot

    uint4* ring;
    const item_t *keys, *vals;
    int end, own, d;

    __device__ __forceinline__ void start(uint4* shared, const item_t* k, const item_t* v, const half_t*, const half_t*, int first, int last) {
        const int lane = threadIdx.x % 32;
        ring = shared + threadIdx.x, keys = k, vals = v, end = last;
        own = first + threadIdx.x / 32 * HEAD_SLOTS + lane / LANES_PER_HEAD, d = 8 * (lane % LANES_PER_HEAD);
    }

    __device__ __forceinline__ void load(int stage, int first) {
        uint4* slots = ring + stage * UNROLL * 2 * THREADS;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int key = own + first + u * STRIDE;
            if (key < end && d < HEAD_DIM) {
                copy16_async(slots + 2 * u * THREADS, keys + (u64)key * HEAD_DIM + d);
                copy16_async(slots + (2 * u + 1) * THREADS, vals + (u64)key * HEAD_DIM + d);
            }
        }
        commit_copies();
    }

    __device__ __forceinline__ void wait() { wait_copies<DEPTH - 1>(); }
    __device__ __forceinline__ void release() {}
    __device__ __forceinline__ bool holds(int first, int u) const { return own + first + u * STRIDE < end; }

    __device__ __forceinline__ void read_key(int stage, int first, int u, float* k, float& scale) const {
        const uint4* slots = ring + stage * UNROLL * 2 * THREADS;
        unpack8(holds(first, u) && d < HEAD_DIM ? slots[2 * u * THREADS] : make_uint4(0, 0, 0, 0), k);
        scale = 1.f;
    }

    __device__ __forceinline__ Piece read_value(int stage, int first, int u, float& scale) const {
        const uint4* slots = ring + stage * UNROLL * 2 * THREADS;
        scale = 1.f;
        return holds(first, u) && d < HEAD_DIM ? slots[(2 * u + 1) * THREADS] : make_uint4(0, 0, 0, 0);
    }
};

#else

constexpr int UNROLL = 4;
constexpr int WARP_KEYS = UNROLL * HEAD_SLOTS;  // of a warp in a stage, one after the other in the cache
constexpr int STAGE_KEYS = WARP_KEYS * WARPS;
typedef uint2 Piece;

__device__ __forceinline__ void unpack_piece(Piece v, float* f) { unpack_levels(v, f); }

// A lane's 8 levels are half of what is copied at once, so a warp copies its keys, values and scales together and the
// lanes read what others have copied. Of the scales, whole groups of 8 keys are copied; what of them belongs to others, or is
// being written for the new token, is not looked at.
struct Ring {  // per warp and stage: levels [K, V][WARP_KEYS][HEAD_DIM], scales [K, V][SCALE_GROUPS * 8]
    static constexpr int VALUES = WARP_KEYS * HEAD_DIM;                // bytes of K
    static constexpr int SCALE_GROUPS = (WARP_KEYS + 7) / 8, SCALES = 16 * SCALE_GROUPS;
    static constexpr int WARP_STAGE = 2 * VALUES + 2 * SCALES;        // bytes; as in attention.py
    static constexpr int PIECES = VALUES / 16;

    char* ring;
    const item_t *keys, *vals;
    const half_t *key_scales, *value_scales;
    int begin, end, slot, d;  // begin: this warp's first key of stage 0, a multiple of WARP_KEYS

    __device__ __forceinline__ void start(uint4* shared, const item_t* k, const item_t* v, const half_t* k_scales, const half_t* v_scales,
                                          int first, int last) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        ring = (char*)shared + warp * DEPTH * WARP_STAGE, keys = k, vals = v, key_scales = k_scales, value_scales = v_scales;
        begin = first + warp * WARP_KEYS, end = last, slot = lane / LANES_PER_HEAD, d = 8 * (lane % LANES_PER_HEAD);
    }

    __device__ __forceinline__ void load(int stage, int first) {
        const int lane = threadIdx.x % 32, key = begin + first;
        char* target = ring + stage * WARP_STAGE;
#pragma unroll
        for (int i = 0; i < PIECES; i += 32) {
            const int piece = i + lane;
            if (piece < PIECES && key + piece * 16 / HEAD_DIM < end) {
                copy16_async(target + piece * 16, keys + (u64)key * HEAD_DIM + piece * 16);
                copy16_async(target + VALUES + piece * 16, vals + (u64)key * HEAD_DIM + piece * 16);
            }
        }
        const int group = lane / 2, of_values = lane % 2;
        const int scale_key = (key & ~7) + 8 * group;  // below 8 keys a warp may begin in the middle of a group
        if (group < SCALE_GROUPS && scale_key < end)
            copy16_async(target + 2 * VALUES + of_values * SCALES + 16 * group, (of_values ? value_scales : key_scales) + scale_key);
        commit_copies();
    }

    __device__ __forceinline__ void wait() {
        wait_copies<DEPTH - 1>();
        __syncwarp();
    }

    __device__ __forceinline__ void release() { __syncwarp(); }  // all lanes have read before one copies anew
    __device__ __forceinline__ bool holds(int first, int u) const { return begin + first + u * HEAD_SLOTS + slot < end; }

    __device__ __forceinline__ Piece read(int stage, int first, int u, int of_values, float& scale) const {
        const char* source = ring + stage * WARP_STAGE;
        const int key = u * HEAD_SLOTS + slot;
        if (!holds(first, u)) {
            scale = 0.f;
            return make_uint2(0, 0);
        }
        const half_t* scales = (const half_t*)(source + 2 * VALUES + of_values * SCALES);
        scale = scale_value(scales[((begin + first) & 7) + key]);
        return d < HEAD_DIM ? *(const uint2*)(source + of_values * VALUES + key * HEAD_DIM + d) : make_uint2(0, 0);
    }

    __device__ __forceinline__ void read_key(int stage, int first, int u, float* k, float& scale) const {
        unpack_levels(read(stage, first, u, 0, scale), k);
    }

    __device__ __forceinline__ Piece read_value(int stage, int first, int u, float& scale) const {
        return read(stage, first, u, 1, scale);
    }
};

#endif

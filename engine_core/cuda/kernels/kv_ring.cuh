// How attention_decode.cu reads the KV cache: each warp copies tiles of 16 keys through a ring of its own in shared memory,
// DEPTH pieces deep; a piece is K or V of a tile, in turn. Keys past the end and elements past HEAD_DIM are zeros.
//
// A row of a piece is padded to 64 elements. Its 16-byte units are exchanged by row (``swizzle``), so that the reads of K (rows
// g, units t) and of V (rows 2 t, units g) meet no bank twice.
#pragma once
#include "rope.cuh"
#if KV_INT8
#include "kv_int8.cuh"
#endif

#if KV_INT8
typedef uint2 Piece;  // 8 elements of a cached vector
#else
typedef uint4 Piece;
#endif

constexpr int TILE = 16;
constexpr int ROW_BYTES = (HEAD_DIM + 63) / 64 * 64 * (int)sizeof(item_t), ROW_UNITS = ROW_BYTES / 16;
constexpr int SCALES = TILE * ROW_BYTES;                      // where the scales of a piece begin
constexpr int PIECE_BYTES = SCALES + (KV_INT8 ? 2 * TILE : 0);  // as in attention.py
constexpr int UNITS = HEAD_DIM * (int)sizeof(item_t) / 16;    // of a row in the cache

__device__ __forceinline__ int swizzle(int row) {
#if KV_INT8
    return ROW_UNITS % 8 == 0 ? ((row ^ row >> 1) & 3) << 1 : row & 2;
#else
    return (row & 6) ^ (row & 1) << 2;
#endif
}

// Where elements 8 c … 8 c + 7 of a row lie.
__device__ __forceinline__ char* chunk(char* piece, int row, int c) {
#if KV_INT8
    return piece + row * ROW_BYTES + 16 * (c / 2 ^ swizzle(row)) + 8 * (c % 2);
#else
    return piece + row * ROW_BYTES + 16 * (c ^ swizzle(row));
#endif
}

// These eight elements in 16 bits: as they are, or the quantized values without their scale.
__device__ __forceinline__ uint4 read_chunk(char* piece, int row, int c) {
#if KV_INT8
    return quantized_to_half(*(const uint2*)chunk(piece, row, c));
#else
    return *(const uint4*)chunk(piece, row, c);
#endif
}

#if KV_INT8
__device__ __forceinline__ float read_scale(const char* piece, int row) { return scale_value(((const half_t*)(piece + SCALES))[row]); }
#endif

struct Ring {
    char* pieces;          // of this warp: [DEPTH][PIECE_BYTES]
    item_t* cached[2];     // K and V of the head
    half_t* scales[2];     // with KV_INT8
    int first, end;        // the warp's first key, and the end of the keys in the cache

    // Piece ``number`` of the warp into ``slot``: K (even) or V (odd) of its tile number / 2.
    __device__ __forceinline__ void load(int slot, int number) const {
        const int lane = threadIdx.x % 32, key = first + number / 2 * TILE * WARPS;
        const item_t* rows = cached[number % 2];
        char* target = pieces + slot * PIECE_BYTES;
#pragma unroll
        for (int i = 0; i < TILE * ROW_UNITS; i += 32) {
            const int row = (i + lane) / ROW_UNITS, unit = (i + lane) % ROW_UNITS;
            const bool inside = key + row < end && (UNITS == ROW_UNITS || unit < UNITS);
            copy16_async(target + row * ROW_BYTES + 16 * (unit ^ swizzle(row)),
                         (const char*)rows + (inside ? (u64)(key + row) * UNITS * 16 + unit * 16 : 0), inside ? 16 : 0);
        }
#if KV_INT8
        if (lane < TILE / 8) {
            const bool inside = key + 8 * lane < end;
            copy16_async(target + SCALES + 16 * lane, scales[number % 2] + (inside ? key + 8 * lane : 0), inside ? 16 : 0);
        }
#endif
        commit_copies();
    }
};

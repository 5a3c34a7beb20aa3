// Tiles of a matrix W [ROWS][COLS] for tensor cores: packed ones of 4- or 8-bit values, or 16-bit weights as they are (BITS).
//
// A packed tile has 16 rows and 128 columns, a group: 1024 or 2048 bytes of values, then its scales. One tile is the A operand of eight
// m16n8k16 multiplications: lane 4 g + t holds columns 32 t … 32 t + 31 of rows g and g + 8. The order of the columns is free as long as
// B has the same. Tiles at the edges are filled up: columns beyond COLS meet zeros in B, rows beyond ROWS are not written.
// With GROUP_SIZE 32 or 64 a tile's columns are PARTS with a scale each. Lane 4 g + t then holds columns 32 e + 8 t on as its eight
// number e, so that two multiplications have 32 consecutive columns.
//
// W is [ROWS / 16] strips of [COLS / 128] tiles, both rounded up. FLOATS says what the values are and what scales they have:
//   0, 4 or 8 bits   integers, (value - 8) * scale or (value - 128) * scale; a 16-bit scale for each row and part of a tile, [g][PARTS],
//                    those of rows g and g + 8 side by side, of the type of weights or, with HALF_SCALES, fp16. ZEROS: (value - zero) * scale, with zeros of a byte in the same order
//                    after the scales (integer_layout.py)
//   1, 8 bits        E4M3. GROUP_SCALES 1: a float32 scale for each row of a tile, side by side as above; 0: one for each row of W
//                    (fp8_layout.py)
//   1, 4 bits        E2M1. An E4M3 scale for every 16 columns, four to a lane, and a float32 scale for each row of W (nvfp4_layout.py)
// Scales of whole rows are 16 float32 values, filled up to STRIP_END bytes, after the tiles of a strip.
//
// With 16 bits W is row-major, without scales. Lane 4 g + t takes columns 8 t, 8 t + 32, 8 t + 64 and 8 t + 96 on, 8 of each, so that
// four lanes read 64 bytes of a row.
#pragma once
#include "mma.cuh"

#ifndef FLOATS
#define FLOATS 0
#endif
#ifndef GROUP_SCALES
#define GROUP_SCALES 0
#endif
#ifndef GROUP_SIZE
#define GROUP_SIZE 128  // columns that share a scale of integers
#endif
#ifndef ZEROS
#define ZEROS 0
#endif
#ifndef HALF_SCALES
#define HALF_SCALES 0  // scales of integers are fp16 though BF16 is 1
#endif
#define PARTED (GROUP_SIZE < 128 || ZEROS)  // a tile has more than a scale for each row

constexpr int TILE = 16, GROUP = 128;
constexpr int UNITS = GROUP / 8;  // of 8 columns
constexpr int PARTS = GROUP / GROUP_SIZE, PART_EIGHTS = 4 / PARTS;  // of a lane's four eights
constexpr bool IN_ORDER = BITS == 16 || PARTS > 1;                  // of the two orders of columns above
constexpr int PIECES = BITS / 4;  // uint4 a lane has of one row of a tile; of row g + 8 as many follow
constexpr int SCALES = 2 * PIECES * 32;  // the first uint4 of the scales
constexpr int SCALE_UNITS = BITS == 16 ? 0 : !FLOATS ? (2 + ZEROS) * PARTS : BITS == 4 ? 8 : GROUP_SCALES ? 4 : 0;  // uint4 of a tile's scales
constexpr int TILE_BYTES = (SCALES + SCALE_UNITS) * 16;
constexpr bool HAS_ROW_SCALES = FLOATS && (BITS == 4 || !GROUP_SCALES);
constexpr int STRIP_END = HAS_ROW_SCALES ? 128 : 0;
constexpr int GROUPS = (COLS + GROUP - 1) / GROUP, TILES = (ROWS + TILE - 1) / TILE;
constexpr u64 STRIP_BYTES = (u64)GROUPS * TILE_BYTES + STRIP_END;
static_assert(BITS == 4 || BITS == 8 || BITS == 16, "4, 8 or 16 bits");
static_assert(COLS % 8 == 0, "unsupported shape");  // input is read in 16 bytes
static_assert(PARTS == 1 || PARTS == 2 || PARTS == 4, "groups of 32, 64 or 128");
static_assert(GROUP_SIZE * PARTS == GROUP && (!FLOATS || (PARTS == 1 && !ZEROS)), "unsupported");

__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {  // exactly, two 16-bit values at a time
    u32 product;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#endif
    return product;
}

// What widen puts bits into, in registers: as constants some of it would be moved there again for each use. ``zero``: 0, but
// not as a constant.
struct Patterns {
    u32 even, odd;

    __device__ __forceinline__ explicit Patterns(u32 zero = 0u) {
#if BF16
        even = zero | 0x43004300u, odd = zero | 0xc380c380u;
#elif BITS == 4
        even = zero | 0x64006400u, odd = zero | 0x54005400u;
#else
        even = odd = zero | 0x64646464u;
#endif
    }
};

// ``widen``: eight of a lane's weights, number ``eight`` of four, as four pairs of 16 bits of neighbouring columns, each more
// than the weight by OFFSETS of its pair. Subtracting that from a sum costs less than subtracting it from the weights.
#if BITS == 16

__device__ constexpr float OFFSETS[4] = {};

__device__ __forceinline__ void widen(u32 (&v)[4], const uint4 (&pieces)[4], int eight, Patterns patterns = Patterns()) {
    v[0] = pieces[eight].x, v[1] = pieces[eight].y, v[2] = pieces[eight].z, v[3] = pieces[eight].w;
}

#elif FLOATS && BITS == 8

__device__ constexpr float OFFSETS[4] = {};
#if !BF16 && __CUDA_ARCH__ < 890
#define E4M3_UNIT 256.f
#endif

// E4M3 in 16 bits. Where the GPU has no instruction for it, exponent and mantissa go to their places and the difference of the
// exponents' biases is left to multiply by: at once with bf16, whose exponent would leave float32's range, else in the scales.
__device__ __forceinline__ void widen(u32 (&v)[4], const uint4 (&pieces)[2], int eight, Patterns patterns = Patterns()) {
    const uint4 piece = pieces[eight / 2];
    const u32 words[2] = {eight % 2 ? piece.z : piece.x, eight % 2 ? piece.w : piece.y};  // bytes 2 n and 2 n + 1
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const u32 w = words[pair / 2];
#if !BF16 && __CUDA_ARCH__ >= 890
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(v[pair]) : "h"((u16)(pair % 2 ? w >> 16 : w)));
#else
        const u32 x = __byte_perm(w, 0, pair % 2 ? 0x3424 : 0x1404);  // each byte high in its half
#if BF16
        v[pair] = multiply_pairs((x & 0x80008000u) | ((x & 0x7f007f00u) >> 4), 0x7b807b80u);  // 2^120
#else
        v[pair] = (x & 0x80008000u) | ((x & 0x7f007f00u) >> 1);
#endif
#endif
    }
}

#elif FLOATS

__device__ constexpr float OFFSETS[4] = {};

// E2M1 in 16 bits, looked up: a nibble's low three bits are the magnitude of a value and choose a byte of a table. Signs of values
// 0 to 3 are the highest bits of nibbles 1, 3, 5 and 7, those of values 4 to 7 of nibbles 0, 2, 4 and 6.
__device__ __forceinline__ void widen(u32 (&v)[4], const uint4 (&pieces)[1], int eight, Patterns patterns = Patterns()) {
    const u32 words[4] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w}, w = words[eight];
    const u32 magnitudes = w & 0x77777777u;
#pragma unroll
    for (int four = 0; four < 2; ++four) {
        const u32 which = four ? magnitudes >> 16 : magnitudes, signs = four ? w << 4 : w;
#if BF16
        const u32 low = __byte_perm(0xc0800000u, 0xc0804000u, which);
        const u32 high = __byte_perm(0x3f3f3f00u, 0x40404040u, which) | (signs & 0x80808080u);
        v[2 * four] = __byte_perm(low, high, 0x5140), v[2 * four + 1] = __byte_perm(low, high, 0x7362);
#else
        const u32 high = __byte_perm(0x3e3c3800u, 0x46444240u, which) | (signs & 0x80808080u);
        v[2 * four] = __byte_perm(high, 0, 0x1404), v[2 * four + 1] = __byte_perm(high, 0, 0x3424);
#endif
    }
}

#elif BITS == 4

#if BF16
__device__ constexpr float OFFSETS[4] = {136.f, 136.f, 136.f, 136.f};  // 0x4300 | n is 128 + n, and n is the weight + 8
#else
__device__ constexpr float OFFSETS[4] = {1032.f, 72.f, 1032.f, 72.f};  // 0x6400 | n is 1024 + n, 0x5400 | n << 4 is 64 + n
#endif

__device__ __forceinline__ void widen(u32 (&v)[4], const uint4 (&pieces)[1], int eight, Patterns patterns = Patterns()) {
    const u32 words[4] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w}, w = words[eight];  // nibbles n and n + 4
#if BF16
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) v[pair] = ((w >> 4 * pair) & 0x000f000fu) | patterns.even;
#else
#pragma unroll
    for (int byte = 0; byte < 2; ++byte) {
        const u32 x = w >> 8 * byte;
        v[2 * byte] = (x & 0x000f000fu) | patterns.even, v[2 * byte + 1] = (x & 0x00f000f0u) | patterns.odd;
    }
#endif
}

#else

#if BF16
__device__ constexpr float OFFSETS[4] = {};
#else
__device__ constexpr float OFFSETS[4] = {1152.f, 1152.f, 1152.f, 1152.f};  // 0x6400 | n is 1024 + n, and n is the weight + 128
#endif

__device__ __forceinline__ void widen(u32 (&v)[4], const uint4 (&pieces)[2], int eight, Patterns patterns = Patterns()) {
    const uint4 piece = pieces[eight / 2];
    const u32 words[2] = {eight % 2 ? piece.z : piece.x, eight % 2 ? piece.w : piece.y};  // bytes 2 n and 2 n + 1
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const u32 w = words[pair / 2], selector = pair % 2 ? 0x4342u : 0x4140u;
#if BF16  // 0x4300 | low 7 bits is 128 + those; -256 or, with the high bit, -128 makes them the value
        const u32 x = __byte_perm(w, 0, selector);
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(v[pair]) : "r"((x & 0x007f007fu) | patterns.even), "r"(0x3f803f80u), "r"((x & 0x00800080u) ^ patterns.odd));
#else
        v[pair] = __byte_perm(w, patterns.even, selector);
#endif
    }
}

#endif

#ifndef E4M3_UNIT
#define E4M3_UNIT 1.f  // what the values of ``widen`` are to be multiplied by
#endif

__device__ __forceinline__ float2 unpack_scales(u32 v) { return HALF_SCALES ? unpack_fp16(v) : unpack2(v); }

// The scales of rows g and g + 8 of a tile, for all of its columns.
__device__ __forceinline__ float2 group_scales(const void* tile, int g) {
    const uint4* scales = (const uint4*)tile + SCALES;
#if BITS == 16 || FLOATS
    if (SCALE_UNITS != 4) return make_float2(1.f, 1.f);
    const float2 both = ((const float2*)scales)[g];
    return make_float2(both.x * E4M3_UNIT, both.y * E4M3_UNIT);
#else
    return unpack_scales(((const u32*)scales)[g]);
#endif
}

#if PARTED
// The same for each part of the columns, and with ZEROS what stands for 0 in each, less what does without them.
struct PartScales {
    u32 pairs[4], zeros[2];  // of PARTS: two scales, and two bytes

    __device__ __forceinline__ PartScales(const void* tile, int g) {
        const u32* scales = (const u32*)((const uint4*)tile + SCALES) + g * PARTS;
        if (PARTS == 4) {
            const uint4 v = *(const uint4*)scales;
            pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
        } else if (PARTS == 2) {
            const uint2 v = *(const uint2*)scales;
            pairs[0] = v.x, pairs[1] = v.y;
        } else {
            pairs[0] = scales[0];
        }
        if (!ZEROS) return;
        const unsigned char* bytes = (const unsigned char*)((const uint4*)tile + SCALES + 2 * PARTS) + g * 2 * PARTS;
        if (PARTS == 4) {
            const uint2 v = *(const uint2*)bytes;
            zeros[0] = v.x, zeros[1] = v.y;
        } else {
            zeros[0] = PARTS == 2 ? *(const u32*)bytes : *(const u16*)bytes;
        }
    }

    __device__ __forceinline__ float2 scale(int part) const { return unpack_scales(pairs[part]); }

    __device__ __forceinline__ float2 zero(int part) const {
        if (!ZEROS) return make_float2(0.f, 0.f);
        constexpr float MIDDLE = 8388608.f + (1 << (BITS - 1));  // 2^23, in whose lowest byte a zero is put
        const u32 both = zeros[part / 2] >> 16 * (part % 2);
        return make_float2(__uint_as_float(__byte_perm(both, 0x4b000000u, 0x7650)) - MIDDLE,
                           __uint_as_float(__byte_perm(both, 0x4b000000u, 0x7651)) - MIDDLE);
    }
};
#endif

// The scales of rows g and g + 8 of W in the strip of ``tile``, for all of their columns. weights: the first strip.
__device__ __forceinline__ float2 row_scales(const unsigned char* weights, int tile, int g) {
    if (!HAS_ROW_SCALES || tile >= TILES) return make_float2(1.f, 1.f);
    const float2 both = ((const float2*)(weights + (tile + 1) * STRIP_BYTES - STRIP_END))[g];
    return make_float2(both.x * E4M3_UNIT, both.y * E4M3_UNIT);
}

// A lane's scales of 16 columns each, which weights are multiplied by in 16 bits: that is exact.
#if FLOATS && BITS == 4
struct BlockScales {
    u32 pairs[2][2];  // of rows g and g + 8: of columns 32 t and 32 t + 16 on, twice in each

    __device__ __forceinline__ BlockScales(const void* tile, int lane) {
        const u32 codes = ((const u32*)((const uint4*)tile + SCALES))[lane];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 x = __byte_perm(codes, 0, 0x0404 | 0x1010 * i);  // the code high in both halves; none is negative
            pairs[i / 2][i % 2] = BF16 ? multiply_pairs(x >> 4, 0x7b807b80u) : multiply_pairs(x >> 1, 0x5c005c00u);  // 2^120, 2^8
        }
    }

    __device__ __forceinline__ void apply(u32 (&v)[4], int half, int eight) const {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) v[pair] = multiply_pairs(v[pair], pairs[half][eight / 2]);
    }
};
#else
struct BlockScales {
    __device__ __forceinline__ BlockScales(const void*, int) {}
    __device__ __forceinline__ void apply(u32 (&)[4], int, int) const {}
};
#endif

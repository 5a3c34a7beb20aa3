// Tiles of a matrix W [ROWS][COLS] for tensor cores: packed ones of 4- or 8-bit values, or 16-bit weights as they are (BITS).
//
// A packed tile has 16 rows and 128 columns, a group, with one scale per row. W is [ROWS / 16][COLS / 128] tiles, rounded up, of 1024 or
// 2048 bytes of values and 16 scales of 16 bits, those of rows g and g + 8 side by side (int4_layout.py, int8_layout.py). A weight is
// (value - 8) * scale or (value - 128) * scale. One tile is the A operand of eight m16n8k16 multiplications: lane 4 g + t holds columns
// 32 t … 32 t + 31 of rows g and g + 8. The order of the columns is free as long as B has the same. Tiles at the edges are
// filled up: columns beyond COLS meet zeros in B, rows beyond ROWS are not written.
//
// With 16 bits W is row-major, without scales. Lane 4 g + t takes columns 8 t, 8 t + 32, 8 t + 64 and 8 t + 96 on, 8 of each, so that
// four lanes read 64 bytes of a row.
#pragma once
#include "mma.cuh"

constexpr int TILE = 16, GROUP = 128, TILE_BYTES = TILE * GROUP * BITS / 8 + (BITS < 16 ? TILE * 2 : 0);
constexpr int UNITS = GROUP / 8;  // of 8 columns
constexpr int PIECES = BITS / 4;  // uint4 a lane has of one row of a tile; of row g + 8 as many follow
constexpr int SCALES = 2 * PIECES * 32;  // the first uint4 of the scales
constexpr int GROUPS = (COLS + GROUP - 1) / GROUP, TILES = (ROWS + TILE - 1) / TILE;
static_assert(BITS == 4 || BITS == 8 || BITS == 16, "4, 8 or 16 bits");
static_assert(COLS % 8 == 0, "unsupported shape");  // input is read in 16 bytes

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

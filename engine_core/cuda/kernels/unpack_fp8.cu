// The codes of an fp8 matrix with a scale for each row, out of its packed tiles (packed.cuh): [ROWS][COLS] row-major, and the scales
// [ROWS], for cuBLASLt. Nothing is computed: a warp moves the 16 bytes of each lane, whole lines of four rows at a time.
#include "packed.cuh"

static_assert(FLOATS && BITS == 8 && !GROUP_SCALES && COLS % 16 == 0, "unsupported");

constexpr int ROW_UNITS = GROUP / 16;                // uint4 of a row of a tile
constexpr int ROUNDS = TILE * ROW_UNITS / 32;        // of a warp

extern "C" __global__ void __launch_bounds__(32 * DEQUANTIZE_WARPS) unpack_fp8(const uint4* tiles, uint4* codes, float* scales) {
    const u64 tile = (u64)blockIdx.x * DEQUANTIZE_WARPS + threadIdx.x / 32;
    if (tile >= (u64)TILES * GROUPS) return;
    const int lane = threadIdx.x % 32, strip = tile / GROUPS, group = tile % GROUPS;
    const uint4* source = tiles + (strip * STRIP_BYTES + group * TILE_BYTES) / 16;
    uint4 units[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int row = (32 * i + lane) / ROW_UNITS, unit = lane % ROW_UNITS;  // of columns 16 unit on: t = unit / 2, piece = unit % 2
        units[i] = source[(row / 8 * PIECES + unit % 2) * 32 + row % 8 * 4 + unit / 2];
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int row = strip * TILE + (32 * i + lane) / ROW_UNITS, unit = group * ROW_UNITS + lane % ROW_UNITS;
        const bool has_row = ROWS % TILE == 0 || row < ROWS, has_unit = COLS % GROUP == 0 || unit < COLS / 16;
        if (has_row && has_unit) codes[(u64)row * (COLS / 16) + unit] = units[i];
    }
    const int row = strip * TILE + lane;
    if (group == 0 && lane < TILE && row < ROWS) {
        const float2 both = ((const float2*)((const unsigned char*)tiles + (strip + 1) * STRIP_BYTES - STRIP_END))[lane % 8];
        scales[row] = lane < 8 ? both.x : both.y;
    }
}

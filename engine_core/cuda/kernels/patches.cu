// The patches of a picture as rows of a GEMM, 16-bit [gridDim.x][COLS], of which the first VALUES are the patch's and the others zeros.
//
// With TILE, pixels are float32 [channels][TILE][TILE] and patches are PATCH x PATCH of them, SIDE to a row: a tile's pixels behind the
// last whole patch are in none. Without it pixels are float32 [patches][VALUES].
#include "common.cuh"

#ifndef TILE
#define TILE 0
#define PATCH 1
#define SIDE 1
#endif

extern "C" __global__ void __launch_bounds__(THREADS) patches(const float* pixels, half_t* rows) {
    const int row = blockIdx.x;
    let_next_start();
    wait_for_previous();
    for (int i = threadIdx.x; i < COLS; i += THREADS) {
        const int channel = i / (PATCH * PATCH), y = i / PATCH % PATCH, x = i % PATCH;
        const u64 place = TILE ? ((u64)channel * TILE + row / SIDE * PATCH + y) * TILE + row % SIDE * PATCH + x : (u64)row * VALUES + i;
        rows[(u64)row * COLS + i] = i < VALUES ? to_half(load4f(pixels + place)) : (half_t)0;
    }
}

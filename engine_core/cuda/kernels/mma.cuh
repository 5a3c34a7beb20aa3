// Tensor core multiplication of 16 × 16 by 16 × 8 in the 16-bit type with float32 sums (mma.m16n8k16). Lane 4 g + t holds, two
// columns to a register: of A rows g, g + 8, g, g + 8 at columns 2 t (twice) and 2 t + 8 (twice); of B rows 2 t and 2 t + 8 of
// column g; of C rows g (c[0], c[1]) and g + 8 at columns 2 t.
#pragma once
#include "common.cuh"

#if BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif

__device__ __forceinline__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm(MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The first multiplication of sums that begin with ``start`` in the first of the two columns and ``next`` in the second one.
__device__ __forceinline__ void multiply_first(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float start, float next) {
    asm(MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %10, %11};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(start), "f"(next));
}

__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) { multiply(c, a[0], a[1], a[2], a[3], b0, b1); }

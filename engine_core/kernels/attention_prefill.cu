// Causal attention of ``count`` new tokens over the linear KV cache, on tensor cores, with an online softmax: the
// forward pass of flash attention 2 (Dao 2023, arXiv 2307.08691), 16 query rows per warp.
//
// qkv: [count][(HEADS + 2 KV_HEADS) HEAD_DIM] with q rotated; cache: this layer's [2][KV_HEADS][CONTEXT][HEAD_DIM], which
// already holds the new K and V; output: [count][HEADS][HEAD_DIM]. Query i is at position start + i. Grid (tiles of 64, HEADS).
//
// With KV_INT8 the cache holds levels and ``scales`` their steps (kv_int8.cuh): a tile is copied as it is, two stages as
// well, and made 16-bit in shared memory before the products, as precise as a 16-bit cache would be.
#include "mma.cuh"
#if KV_INT8
#include "kv_int8.cuh"
#endif

constexpr int WARPS = 4, THREADS = 32 * WARPS, TILE_Q = 16 * WARPS;
constexpr int TILE_K = HEAD_DIM > 128 ? 32 : 64;  // keys of a stage
constexpr int PITCH = HEAD_DIM + 8;               // elements of a shared row: 16 bytes more, against bank conflicts
constexpr int STEPS = HEAD_DIM / 16, KEY_TILES = TILE_K / 8, DIM_TILES = HEAD_DIM / 8;
constexpr float LOWEST = -1e30f;
static_assert(HEAD_DIM % 16 == 0, "head_dim must be a multiple of 16");

__device__ __forceinline__ void load_matrices(u32* r, const half_t* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32* r, const half_t* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

#if KV_INT8

struct Stage {  // a tile as it lies in the cache: K, V
    item_t levels[2][TILE_K * HEAD_DIM];
    half_t scales[2][TILE_K];
};

// Of the last group of 8 scales some may be of no key; convert does not look at them.
__device__ __forceinline__ void load_stage(Stage& stage, const item_t* keys, const half_t* scales, int first, int total) {
    constexpr int PIECES = HEAD_DIM / 16, GROUPS = TILE_K / 8;
    for (int i = threadIdx.x; i < 2 * TILE_K * PIECES; i += THREADS) {
        const int part = i / (TILE_K * PIECES), piece = i % (TILE_K * PIECES), row = piece / PIECES;
        const bool inside = first + row < total;
        const item_t* source = keys + (u64)part * KV_HEADS * CONTEXT * HEAD_DIM + (u64)(inside ? first : 0) * HEAD_DIM;
        copy16_async(stage.levels[part] + piece * 16, source + (inside ? piece * 16 : 0), inside ? 16 : 0);
    }
    for (int i = threadIdx.x; i < 2 * GROUPS; i += THREADS) {
        const int part = i / GROUPS, group = i % GROUPS;
        const bool inside = first + group * 8 < total;
        const half_t* source = scales + part * KV_HEADS * SCALE_PITCH + (inside ? first + group * 8 : 0);
        copy16_async(stage.scales[part] + group * 8, source, inside ? 16 : 0);
    }
}

__device__ __forceinline__ void convert(half_t* shared, const Stage& stage, int first, int total) {
    constexpr int PIECES = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < 2 * TILE_K * PIECES; i += THREADS) {
        const int part = i / (TILE_K * PIECES), piece = i % (TILE_K * PIECES), row = piece / PIECES;
        const float scale = first + row < total ? scale_value(stage.scales[part][row]) : 0.f;
        float v[8];
        unpack_levels(*(const uint2*)(stage.levels[part] + piece * 8), v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= scale;
        *(uint4*)(shared + part * TILE_K * PITCH + row * PITCH + piece % PIECES * 8) = pack8(v);
    }
}

#else

__device__ __forceinline__ void load_tile(half_t* shared, const half_t* rows, int first, int total) {
    constexpr int PIECES = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < TILE_K * PIECES; i += THREADS) {
        const int row = i / PIECES, d = i % PIECES * 8;
        const bool inside = first + row < total;  // zeros past the end: 0 * V must be 0
        copy16_async(shared + row * PITCH + d, rows + (u64)(inside ? first + row : 0) * HEAD_DIM + d, inside ? 16 : 0);
    }
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_prefill(const half_t* qkv, const item_t* cache, half_t* output, int start, int count, const half_t* scales) {
    extern __shared__ half_t tiles[];  // [2 stages][K, V][TILE_K][PITCH]; with KV_INT8 [K, V][TILE_K][PITCH], then 2 Stages
    constexpr int TILE = TILE_K * PITCH, WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, kv_head = head / (HEADS / KV_HEADS);
    const int first_q = (gridDim.x - 1 - blockIdx.x) * TILE_Q;  // the longest work first
    const item_t* keys = cache + (u64)kv_head * CONTEXT * HEAD_DIM;
    const int total = start + min(count, first_q + TILE_Q);
    const int num_tiles = (total + TILE_K - 1) / TILE_K;
    let_next_start();
    wait_for_previous();

#if KV_INT8
    Stage* stages = (Stage*)(tiles + 2 * TILE);
    const half_t* key_scales = scales + kv_head * SCALE_PITCH;
    load_stage(stages[0], keys, key_scales, 0, total);
#else
    const half_t* vals = keys + (u64)KV_HEADS * CONTEXT * HEAD_DIM;
    load_tile(tiles, keys, 0, total);
    load_tile(tiles + TILE, vals, 0, total);
#endif
    commit_copies();

    const int row = first_q + warp * 16 + lane / 4, column = lane % 4 * 2;  // of this lane's first accumulators
    u32 q[STEPS][4];
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + i % 2 * 8, d = s * 16 + column + i / 2 * 8;
            q[s][i] = r < count ? load4(qkv + (u64)r * WIDTH + head * HEAD_DIM + d) : 0u;
        }
    float acc[DIM_TILES][4] = {}, peak[2] = {LOWEST, LOWEST}, sum[2] = {};

    for (int tile = 0; tile < num_tiles; ++tile) {
#if KV_INT8
        half_t* k_tile = tiles;
        if (tile + 1 < num_tiles) load_stage(stages[(tile + 1) % 2], keys, key_scales, (tile + 1) * TILE_K, total);
#else
        half_t* k_tile = tiles + tile % 2 * 2 * TILE;
        if (tile + 1 < num_tiles) {
            half_t* next = tiles + (tile + 1) % 2 * 2 * TILE;
            load_tile(next, keys, (tile + 1) * TILE_K, total);
            load_tile(next + TILE, vals, (tile + 1) * TILE_K, total);
        }
#endif
        half_t* v_tile = k_tile + TILE;
        commit_copies();
        wait_copies<1>();
        __syncthreads();
#if KV_INT8
        convert(tiles, stages[tile % 2], tile * TILE_K, total);
        __syncthreads();
#endif

        float scores[KEY_TILES][4] = {};
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                u32 b[4];  // keys n*8.. and n*8+8.., columns s*16.. and s*16+8..
                load_matrices(b, k_tile + (n * 8 + lane / 16 * 8 + lane % 8) * PITCH + s * 16 + lane / 8 % 2 * 8);
                multiply(scores[n], q[s], b[0], b[1]);
                multiply(scores[n + 1], q[s], b[2], b[3]);
            }
        const int first_key = tile * TILE_K;
        const bool masked = first_key + TILE_K > start + first_q + warp * 16 + 1;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int limit = start + row + h * 8;  // the last key this row sees
            float top = peak[h];
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& score = scores[n][2 * h + j];
                    score = masked && first_key + n * 8 + column + j > limit ? LOWEST : score * SCALE_LOG2E;
                    top = fmaxf(top, score);
                }
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            const float shrink = exp2f(peak[h] - top);
            peak[h] = top;
            sum[h] *= shrink;
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n) acc[n][2 * h] *= shrink, acc[n][2 * h + 1] *= shrink;
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& score = scores[n][2 * h + j];
                    score = exp2f(score - top);
                    sum[h] += score;
                }
        }
#pragma unroll
        for (int s = 0; s < TILE_K / 16; ++s) {
            const u32 a[4] = {pack2(scores[2 * s][0], scores[2 * s][1]), pack2(scores[2 * s][2], scores[2 * s][3]),
                              pack2(scores[2 * s + 1][0], scores[2 * s + 1][1]), pack2(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
            for (int n = 0; n < DIM_TILES; n += 2) {
                u32 b[4];  // keys s*16.. and s*16+8.., dimensions n*8.. and n*8+8..
                load_matrices_transposed(b, v_tile + (s * 16 + lane % 16) * PITCH + n * 8 + lane / 16 * 8);
                multiply(acc[n], a, b[0], b[1]);
                multiply(acc[n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();  // before the stage is filled again
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        const int r = row + h * 8;
        if (r >= count) continue;
        u32* out = (u32*)(output + ((u64)r * HEADS + head) * HEAD_DIM + column);
        const float scale = 1.f / sum[h];
#pragma unroll
        for (int n = 0; n < DIM_TILES; ++n) out[n * 4] = pack2(acc[n][2 * h] * scale, acc[n][2 * h + 1] * scale);
    }
}

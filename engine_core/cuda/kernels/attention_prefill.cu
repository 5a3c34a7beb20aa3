// Causal attention of a chunk of new tokens over the linear KV cache, on tensor cores, with an online softmax: the forward pass of
// flash attention 2 (Dao 2023, arXiv 2307.08691), 16 BLOCKS query rows per warp.
//
// qkv: [tokens][(HEADS + 2 KV_HEADS) HEAD_DIM] with q rotated; cache: this layer's [2][KV_HEADS][CONTEXT][HEAD_DIM], which already
// holds the new K and V; output: [tokens][HEADS][HEAD_DIM]. Grid: (tiles of TILE_Q queries, at least as many as the chunk has,
// HEADS). WARPS warps make a tile of queries. With more GROUPS of warps each group takes TILE_K keys of every stage, and the sums are
// merged at the end. launch_configs.py chooses these sizes.
//
// Without CAUSAL every query sees all keys, those of the chunk: the attention of an encoder.
//
// With KV_INT8 the cache holds quantized values and ``scales`` (kv_int8.cuh). A stage is copied as it is and dequantized to 16 bits
// in shared memory before it is multiplied: as precise as a 16-bit cache would be.
#include "mma.cuh"
#include "scores.cuh"
#ifndef CAUSAL
#define CAUSAL 1
#endif
#if KV_INT8
#include "kv_int8.cuh"
#endif

constexpr int THREADS = 32 * WARPS * GROUPS, WARP_Q = 16 * BLOCKS, TILE_Q = WARPS * WARP_Q;
constexpr int STAGE_K = GROUPS * TILE_K;  // keys of a stage
constexpr int PITCH = HEAD_DIM + 8;       // elements of a shared row: 16 bytes more, against bank conflicts
constexpr int STEPS = HEAD_DIM / 16, KEY_TILES = TILE_K / 8, DIM_TILES = HEAD_DIM / 8;
constexpr float LOWEST = -1e30f;  // a peak before the first key
constexpr float SLACK = 8.f;      // the sums keep an older peak until a weight is 2^8 times as large
static_assert(HEAD_DIM % 16 == 0, "head_dim must be a multiple of 16");

__device__ __forceinline__ void load_matrices(u32* r, const half_t* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32* r, const half_t* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rows of HEAD_DIM elements, PITCH apart, of which the first ``inside`` are read and the others zeros: 0 * V must be 0.
template <int ROWS>
__device__ __forceinline__ void load_rows(half_t* shared, const half_t* rows, int pitch, int inside) {
    constexpr int PIECES = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, d = i % PIECES * 8;
        const bool read = row < inside;
        copy16_async(shared + row * PITCH + d, rows + (u64)(read ? row : 0) * pitch + d, read ? 16 : 0);
    }
}

#if KV_INT8

struct Stage {  // keys as they lie in the cache: K, V
    item_t quantized[2][STAGE_K * HEAD_DIM];
    half_t scales[2][STAGE_K];
};

// Of the last group of 8 scales some may be of no key; convert does not look at them.
__device__ __forceinline__ void load_stage(Stage& stage, const item_t* keys, const half_t* scales, int first, int total) {
    constexpr int PIECES = HEAD_DIM / 16, GROUPS_OF_SCALES = STAGE_K / 8;
    for (int i = threadIdx.x; i < 2 * STAGE_K * PIECES; i += THREADS) {
        const int part = i / (STAGE_K * PIECES), piece = i % (STAGE_K * PIECES), row = piece / PIECES;
        const bool inside = first + row < total;
        const item_t* source = keys + (u64)part * KV_HEADS * CONTEXT * HEAD_DIM + (u64)(inside ? first : 0) * HEAD_DIM;
        copy16_async(stage.quantized[part] + piece * 16, source + (inside ? piece * 16 : 0), inside ? 16 : 0);
    }
    for (int i = threadIdx.x; i < 2 * GROUPS_OF_SCALES; i += THREADS) {
        const int part = i / GROUPS_OF_SCALES, group = i % GROUPS_OF_SCALES;
        const bool inside = first + group * 8 < total;
        const half_t* source = scales + part * KV_HEADS * SCALE_PITCH + (inside ? first + group * 8 : 0);
        copy16_async(stage.scales[part] + group * 8, source, inside ? 16 : 0);
    }
}

// Eight quantized values times their scale, rounded once.
__device__ __forceinline__ uint4 dequantize(uint2 quantized, half_t scale) {
#if BF16
    float v[8];
    unpack_quantized(quantized, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= scale_value(scale);
    return pack8(v);
#else
    const u32 pair = scale | (u32)scale << 16;
    uint4 v = quantized_to_half(quantized);
    asm("mul.f16x2 %0, %0, %1;" : "+r"(v.x) : "r"(pair));
    asm("mul.f16x2 %0, %0, %1;" : "+r"(v.y) : "r"(pair));
    asm("mul.f16x2 %0, %0, %1;" : "+r"(v.z) : "r"(pair));
    asm("mul.f16x2 %0, %0, %1;" : "+r"(v.w) : "r"(pair));
    return v;
#endif
}

__device__ __forceinline__ void convert(half_t* shared, const Stage& stage, int first, int total) {
    constexpr int PIECES = HEAD_DIM / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < 2 * STAGE_K * PIECES; i += THREADS) {
        const int part = i / (STAGE_K * PIECES), piece = i % (STAGE_K * PIECES), row = piece / PIECES;
        const half_t scale = first + row < total ? stage.scales[part][row] : (half_t)0;
        const uint4 values = dequantize(*(const uint2*)(stage.quantized[part] + piece * 8), scale);
        *(uint4*)(shared + part * STAGE_K * PITCH + row * PITCH + piece % PIECES * 8) = values;
    }
}

#endif

#define MASKED __uint_as_float(0xff800000u)  // -infinity

// A warp's rows: of each block of 16 a lane has two, lane / 4 and 8 more.
struct Sums {
    float acc[BLOCKS][DIM_TILES][4], peak[BLOCKS][2], sum[BLOCKS][2];
};
typedef float Scores[BLOCKS][KEY_TILES][4];

// One block's q stays in registers; two blocks' would not leave enough, and are read again for every tile of keys.
constexpr bool Q_SHARED = BLOCKS > 1;
struct Queries {
    u32 kept[Q_SHARED ? 1 : STEPS][4];
    const half_t* shared;  // a warp's, [WARP_Q][PITCH]
};

__device__ __forceinline__ void make_scores(Scores& scores, const Queries& q, const half_t* k_tile, int lane) {
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[m][n][j] = 0.f;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        u32 a[BLOCKS][4];
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
            if (Q_SHARED) {
                load_matrices(a[m], q.shared + (m * 16 + lane % 16) * PITCH + s * 16 + lane / 16 * 8);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) a[m][j] = q.kept[Q_SHARED ? 0 : s][j];
            }
        }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n += 2) {
            u32 b[4];  // keys n*8.. and n*8+8.., columns s*16.. and s*16+8..
            load_matrices(b, k_tile + (n * 8 + lane / 16 * 8 + lane % 8) * PITCH + s * 16 + lane / 8 % 2 * 8);
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m) {
                multiply(scores[m][n], a[m], b[0], b[1]);
                multiply(scores[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// ``seen``: of the tile's keys, those that the lane's first row sees; row r below it sees r more, but without CAUSAL. With WINDOW it
// sees the last of them.
__device__ __forceinline__ void mask(Scores& scores, int seen, int lane) {
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int key = n * 8 + lane % 4 * 2 + j % 2, end = seen + (CAUSAL ? m * 16 + j / 2 * 8 : 0);
                if (key >= end || (WINDOW > 0 && key < end - WINDOW)) scores[m][n][j] = MASKED;
            }
}

__device__ __forceinline__ void cap(Scores& scores) {
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[m][n][j] = soft_capped(scores[m][n][j]);
}

// Scores become weights; sums are made smaller where a row's peak grows.
__device__ __forceinline__ void weigh(Sums& sums, Scores& scores) {
    float top[BLOCKS][2];
    bool grows = false;
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            top[m][h] = MASKED;
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n)
                top[m][h] = fmaxf(top[m][h], fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
            top[m][h] *= SCORE_SCALE;
            grows |= top[m][h] > sums.peak[m][h] + SLACK;
        }
    if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float peak = fmaxf(sums.peak[m][h], top[m][h]);
                peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
                peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
                const float shrink = power_of_2(sums.peak[m][h] - peak);
                sums.peak[m][h] = peak;
                sums.sum[m][h] *= shrink;
#pragma unroll
                for (int n = 0; n < DIM_TILES; ++n) sums.acc[m][n][2 * h] *= shrink, sums.acc[m][n][2 * h + 1] *= shrink;
            }
    }
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& score = scores[m][n][2 * h + j];
                    score = power_of_2(fmaf(score, SCORE_SCALE, -sums.peak[m][h]));
                    sums.sum[m][h] += score;
                }
}

__device__ __forceinline__ void add_values(Sums& sums, const Scores& weights, const half_t* v_tile, int lane) {
#pragma unroll
    for (int s = 0; s < TILE_K / 16; ++s) {
        u32 a[BLOCKS][4];
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* pair = &weights[m][2 * s + j / 2][j % 2 * 2];
                a[m][j] = pack2(pair[0], pair[1]);
            }
#pragma unroll
        for (int n = 0; n < DIM_TILES; n += 2) {
            u32 b[4];  // keys s*16.. and s*16+8.., dimensions n*8.. and n*8+8..
            load_matrices_transposed(b, v_tile + (s * 16 + lane % 16) * PITCH + n * 8 + lane / 16 * 8);
#pragma unroll
            for (int m = 0; m < BLOCKS; ++m) {
                multiply(sums.acc[m][n], a[m], b[0], b[1]);
                multiply(sums.acc[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Adds the other groups' sums to the first one's, through ``shared``. All threads call it.
__device__ __forceinline__ void merge_groups(Sums& sums, float* shared, int group) {
    constexpr int LANES = 32 * WARPS, SHARE = LANES * 4 * BLOCKS * (1 + DIM_TILES);
    static_assert((GROUPS - 1) * SHARE * 4 <= (KV_INT8 ? 2 : 4) * STAGE_K * PITCH * 2, "the sums take the place of the stages");
    float* theirs = shared + threadIdx.x % LANES;
    __syncthreads();  // the last stage has been read
    if (group > 0) {
        theirs += (group - 1) * SHARE;
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                theirs[(4 * m + h) * LANES] = sums.peak[m][h];
                theirs[(4 * m + 2 + h) * LANES] = sums.sum[m][h];
            }
#pragma unroll
            for (int i = 0; i < 4 * DIM_TILES; ++i) theirs[(4 * BLOCKS + m * 4 * DIM_TILES + i) * LANES] = sums.acc[m][i / 4][i % 4];
        }
    }
    __syncthreads();
    if (group > 0) return;
    for (int other = 1; other < GROUPS; ++other, theirs += SHARE)
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float peak = theirs[(4 * m + h) * LANES], top = fmaxf(sums.peak[m][h], peak);
                const float mine = power_of_2(sums.peak[m][h] - top), its = power_of_2(peak - top);
                sums.peak[m][h] = top;
                sums.sum[m][h] = sums.sum[m][h] * mine + theirs[(4 * m + 2 + h) * LANES] * its;
#pragma unroll
                for (int n = 0; n < DIM_TILES; ++n)
#pragma unroll
                    for (int j = 2 * h; j < 2 * h + 2; ++j) {
                        const float value = theirs[(4 * BLOCKS + (m * DIM_TILES + n) * 4 + j) * LANES];
                        sums.acc[m][n][j] = sums.acc[m][n][j] * mine + value * its;
                    }
            }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_prefill(const half_t* qkv, const item_t* cache, half_t* output, const Chunk* chunk, const half_t* scales
                      PLACES_PARAMETER) {
    // [2 stages][K, V][STAGE_K][PITCH], then q if it is shared; with KV_INT8 one stage in 16 bits, q, 2 Stages
    extern __shared__ half_t tiles[];
    constexpr int TILE = STAGE_K * PITCH, WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS, group = threadIdx.x / (32 * WARPS);
    const int head = blockIdx.y, kv_head = head / (HEADS / KV_HEADS);
    const int first_q = (gridDim.x - 1 - blockIdx.x) * TILE_Q;  // the longest work first
    const item_t* keys = cache + load_slot(chunk) * (u64)SLOT_STRIDE + (u64)kv_head * CONTEXT * HEAD_DIM;
    const auto [start, count] = load_chunk(chunk);
    const int total = start + (CAUSAL ? min(count, first_q + TILE_Q) : count);
    // The first one has the first key that a query of the tile sees.
    const int first_stage = WINDOW > 0 ? max(0, start + first_q + 1 - WINDOW) / STAGE_K : 0, num_stages = (total + STAGE_K - 1) / STAGE_K;
    const int first_there = first_stage * STAGE_K;
    const int first_row = first_q + warp * WARP_Q, row = first_row + lane / 4, column = lane % 4 * 2;  // of the first sums
    const half_t* queries = qkv + head * HEAD_DIM;
    half_t* q_tile = tiles + (KV_INT8 ? 2 : 4) * TILE;
    let_next_start();
    if (first_q >= count) return;
    wait_for_previous();

#if KV_INT8
    Stage* stages = (Stage*)(q_tile + (Q_SHARED ? TILE_Q * PITCH : 0));
    const half_t* key_scales = scales + load_slot(chunk) * (u64)SCALE_SLOT_STRIDE + kv_head * SCALE_PITCH;
    load_stage(stages[first_stage % 2], keys, key_scales, first_there, total);
#else
    const half_t* vals = keys + (u64)KV_HEADS * CONTEXT * HEAD_DIM;
    half_t* first_tile = tiles + first_stage % 2 * 2 * TILE;
    load_rows<STAGE_K>(first_tile, keys + (u64)first_there * HEAD_DIM, HEAD_DIM, total - first_there);
    load_rows<STAGE_K>(first_tile + TILE, vals + (u64)first_there * HEAD_DIM, HEAD_DIM, total - first_there);
#endif
    Queries q;
    if (Q_SHARED) {
        load_rows<TILE_Q>(q_tile, queries + (u64)first_q * WIDTH, WIDTH, count - first_q);
        q.shared = q_tile + warp * WARP_Q * PITCH;
    } else {
#pragma unroll
        for (int s = 0; s < (Q_SHARED ? 1 : STEPS); ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = row + i % 2 * 8, d = s * 16 + column + i / 2 * 8;
                q.kept[s][i] = r < count ? load4(queries + (u64)r * WIDTH + d) : 0u;
            }
    }
    commit_copies();
    Sums sums;
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) {
        sums.peak[m][0] = sums.peak[m][1] = LOWEST, sums.sum[m][0] = sums.sum[m][1] = 0.f;
#pragma unroll
        for (int i = 0; i < 4 * DIM_TILES; ++i) sums.acc[m][i / 4][i % 4] = 0.f;
    }
    const int seen_by_all = CAUSAL ? start + first_row + 1 : total;                                  // keys, by every row of this warp
    const int seen_by_any = first_row < count ? (CAUSAL ? start + first_row + WARP_Q : total) : 0;  // and by its last row

    for (int stage = first_stage; stage < num_stages; ++stage) {
        wait_copies<0>();
        __syncthreads();  // the stage has come, and nobody reads the other one any more
        const int next = (stage + 1) * STAGE_K;
#if KV_INT8
        half_t* k_tile = tiles;
        if (next < total) load_stage(stages[(stage + 1) % 2], keys, key_scales, next, total);
        commit_copies();
        convert(k_tile, stages[stage % 2], stage * STAGE_K, total);
        __syncthreads();
#else
        half_t* k_tile = tiles + stage % 2 * 2 * TILE;
        if (next < total) {
            half_t* other = tiles + (stage + 1) % 2 * 2 * TILE;
            load_rows<STAGE_K>(other, keys + (u64)next * HEAD_DIM, HEAD_DIM, total - next);
            load_rows<STAGE_K>(other + TILE, vals + (u64)next * HEAD_DIM, HEAD_DIM, total - next);
        }
        commit_copies();
#endif
        k_tile += group * TILE_K * PITCH;
        const int first_key = stage * STAGE_K + group * TILE_K;
        if (first_key >= seen_by_any || (WINDOW > 0 && first_key + TILE_K <= seen_by_all - WINDOW)) continue;
        Scores scores;
        make_scores(scores, q, k_tile, lane);
        if (CAPPED) cap(scores);
        if (first_key + TILE_K > seen_by_all || (WINDOW > 0 && first_key < seen_by_all + WARP_Q - 1 - WINDOW))
            mask(scores, (CAUSAL ? start + row + 1 : total) - first_key, lane);
        weigh(sums, scores);
        add_values(sums, scores, k_tile + TILE, lane);
    }
    if (GROUPS > 1) {
        merge_groups(sums, (float*)tiles, group);
        if (group > 0) return;
    }

#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = sums.sum[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int r = row + m * 16 + h * 8;
            if (r >= count) continue;
#if ORDERED
            half_t* out = output + (u64)r * HEADS * HEAD_DIM;
#else
            u32* out = (u32*)(output + ((u64)r * HEADS + head) * HEAD_DIM + column);
#endif
            const float scale = 1.f / sum;
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n) {
                const u32 pair = pack2(sums.acc[m][n][2 * h] * scale, sums.acc[m][n][2 * h + 1] * scale);
#if ORDERED
                store_apart(out, places + head * HEAD_DIM + column + 8 * n, pair);
#else
                out[n * 4] = pair;
#endif
            }
        }
}

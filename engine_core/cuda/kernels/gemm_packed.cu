// GEMM for a few tokens: Y = X Wᵀ, W in packed tiles of integers or small floats, or in 16 bits (packed.cuh). Each CTA reads its tiles once
// for TOKENS tokens, so that a short prompt, or one token each of several sequences, takes little longer than a decode step.
//
// X is [tokens][COLS] 16-bit, row-major. EPILOGUE 0: Y [tokens][ROWS] 16-bit; 1: Y [tokens][ROWS] float32, added to; 2: rows are (gate,
// up) in turn and Y [tokens][ROWS / 2] = silu(gate) * up, 16-bit; 3: Y [tokens][ROWS] float32; 4: as 2, with gelu. With BIAS a bias
// [ROWS] is added to the sums first. Grid: (tiles of TOKENS, SPLITS, CTAs along the rows).
//
// A CTA has ROW_WARPS · K_WARPS warps. Each warp has a band of two rows of tiles and copies them through its own ring of DEPTH
// slots, one group of 128 columns to a slot. X passes in stages of STAGE groups through BUFFERS places in shared memory; each of
// the K_WARPS takes its share of a stage, and their sums are added in shared memory. Where there are too few rows, SPLITS CTAs
// divide the columns and the last one to arrive at a tile adds the sums. partial: float32 [row tiles][tiles of TOKENS][SPLITS]
// [TOKENS * 16]; counters: uint32 [row tiles][tiles of TOKENS], 0 between launches.
//
// Within a group the kernel first multiplies X by the quantized values as ``widen`` gives them, starting from minus what
// OFFSETS add; then it multiplies the sum by the scale of the row.
#include "lora.cuh"
#include "packed.cuh"

#define GATED (EPILOGUE == 2 || EPILOGUE == 4)
constexpr int WARPS = ROW_WARPS * K_WARPS, THREADS = 32 * WARPS;
constexpr int BAND = 2, BANDS = (TILES + BAND - 1) / BAND;     // tiles of a warp at a time
constexpr int SHARE = STAGE / K_WARPS;                         // groups of a stage that a warp has
constexpr int EIGHTS_OF_TOKENS = TOKENS / 8;
constexpr int SLOT = BAND * TILE_BYTES;
constexpr int SUMS = 1 + ZEROS;                                // of a part and token: see sum_offsets
constexpr bool HAS_SUMS = BITS < 16 && !FLOATS && (ZEROS || BITS == 4 || !BF16);  // else OFFSETS are 0
#ifndef BIAS
#define BIAS 0
#endif
static_assert(TOKENS % 8 == 0 && STAGE % K_WARPS == 0 && (!GATED || ROWS % 2 == 0), "unsupported shape");
static_assert(BUFFERS > 1 || (GROUPS + SPLITS - 1) / SPLITS <= STAGE, "a second stage needs a second buffer");

// Of X the units of a token lie in the order they are read in, and so that eight lanes meet no bank twice.
__device__ __forceinline__ int unit_place(int token, int eight, int t) { return (4 * eight + t) ^ (token & 1) << 2; }

// A stage of X to shared memory, [STAGE][TOKENS][UNITS], two tokens a warp at a time; tokens and columns that are not there are
// zeros. input: the first token's row from the first of the groups on, of which ``columns`` are there.
__device__ __forceinline__ void load_input(uint4* x, const half_t* input, int groups, int tokens, int columns) {
    const int lane = threadIdx.x % 32, odd = lane / UNITS, unit = lane % UNITS;
#pragma unroll 1
    for (int token = threadIdx.x / 32 * 2 + odd; token < TOKENS; token += 2 * WARPS) {
        const bool inside = token < tokens;  // else zeros, but copied from somewhere
        const half_t* source = input + (inside ? token * COLS : 0) + 8 * unit;
        const int eight = IN_ORDER ? unit / 4 : unit % 4, t = IN_ORDER ? unit % 4 : unit / 4;  // see packed.cuh
        const u32 target = shared_address(x + token * UNITS + unit_place(odd, eight, t)), bytes = inside ? 16 : 0;
#pragma unroll
        for (int group = 0; group < STAGE; ++group) {
            if (GROUPS % (SPLITS * STAGE) != 0 && group >= groups) break;
            const bool has_unit = COLS % GROUP == 0 || group * GROUP + 8 * unit < columns;
            copy16_async(target + group * (TOKENS * UNITS * 16), has_unit ? source + group * GROUP : input, has_unit ? bytes : 0);
        }
    }
}

__device__ __forceinline__ uint4 read_input(const uint4* x, int group, int n, int eight, int g, int t) {
    return x[(group * TOKENS + 8 * n + g) * UNITS + unit_place(g, eight, t)];
}

// Minus what OFFSETS add to each token's sum over a group or a part of it, [groups][PARTS][SUMS][TOKENS]: OFFSETS take the place of
// the rows of a tile. With ZEROS the sum of the token's values follows, which ones make.
__device__ __forceinline__ void sum_offsets(float* offsets, const uint4* x, int groups) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 even = pack2(-OFFSETS[0], -OFFSETS[0]), odd = pack2(-OFFSETS[1], -OFFSETS[1]);
    for (int i = threadIdx.x / 32; i < groups * PARTS * EIGHTS_OF_TOKENS; i += WARPS) {
        const int part = i / EIGHTS_OF_TOKENS, n = i % EIGHTS_OF_TOKENS;  // part: of all groups
        float sums[4] = {}, totals[4] = {};
#pragma unroll
        for (int eight = 0; eight < PART_EIGHTS; ++eight) {
            const uint4 v = read_input(x, part / PARTS, n, part % PARTS * PART_EIGHTS + eight, g, t);
            if (OFFSETS[0] != 0.f) {
                multiply(sums, even, even, odd, odd, v.x, v.y);
                multiply(sums, even, even, odd, odd, v.z, v.w);
            }
#if ZEROS
            const u32 ones = pack2(1.f, 1.f);
            multiply(totals, ones, ones, ones, ones, v.x, v.y);
            multiply(totals, ones, ones, ones, ones, v.z, v.w);
#endif
        }
        if (g != 0) continue;
        float* own = offsets + part * SUMS * TOKENS + 8 * n + 2 * t;
        *(float2*)own = make_float2(sums[0], sums[1]);
        if (ZEROS) *(float2*)(own + TOKENS) = make_float2(totals[0], totals[1]);
    }
    __syncthreads();
}

__device__ __forceinline__ void add(float (&sums)[4], const float4& v) { sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w; }

// What becomes of the sums of COUNT tiles from ``first`` on, which one warp holds as tensor cores leave them.
template <int COUNT>
__device__ __forceinline__ void finish(int first, float (&sums)[BAND][EIGHTS_OF_TOKENS][4], void* output, int count, float* partial,
                                       u32* counters, const half_t* bias, const Lora& lora, const int* lora_adapters_here) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const auto exists = [&](int b) { return TILES % BAND == 0 || first + b < TILES; };
    if (SPLITS > 1) {
        const u64 place = (u64)first * gridDim.x + blockIdx.x, next = gridDim.x;  // of the first tile, and from tile to tile
        const auto part = [&](int b, int split, int n) {
            return (float4*)partial + (((place + b * next) * SPLITS + split) * EIGHTS_OF_TOKENS + n) * 32 + lane;
        };
#pragma unroll
        for (int b = 0; b < COUNT; ++b)
#pragma unroll
            for (int n = 0; n < EIGHTS_OF_TOKENS; ++n)
                if (exists(b)) *part(b, blockIdx.y, n) = make_float4(sums[b][n][0], sums[b][n][1], sums[b][n][2], sums[b][n][3]);
        if (!is_last_warp_to_arrive(counters + place, SPLITS)) return;
#pragma unroll
        for (int b = 0; b < COUNT; ++b)
#pragma unroll
            for (int n = 0; n < EIGHTS_OF_TOKENS; ++n) {
                if (!exists(b)) continue;
                float4 v[SPLITS];
#pragma unroll
                for (int s = 0; s < SPLITS; ++s) v[s] = load16f((const float*)part(b, s, n));
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[b][n][j] = 0.f;
#pragma unroll
                for (int s = 0; s < SPLITS; ++s) add(sums[b][n], v[s]);
            }
    }
#pragma unroll
    for (int b = 0; b < COUNT; ++b)
#pragma unroll
        for (int n = 0; n < EIGHTS_OF_TOKENS; ++n) {
#if LORA_RANK > 0
            if (!exists(b)) continue;
            float terms[2][2] = {};
            const int2 numbers = *(const int2*)(lora_adapters_here + 8 * n + 2 * t);
            lora.add(terms, {numbers.x, numbers.y}, (first + b) * TILE + g, blockIdx.x * TOKENS + 8 * n + 2 * t);
#endif
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (!exists(b)) continue;
                const int token = blockIdx.x * TOKENS + 8 * n + 2 * t + i, row = (first + b) * TILE + g;
                const bool has_low = ROWS % TILE == 0 || row < ROWS, has_high = ROWS % TILE == 0 || row + 8 < ROWS;
                float low = sums[b][n][i], high = sums[b][n][2 + i];  // rows g and g + 8
                if (BIAS && has_low) low += to_float(bias[row]);
                if (BIAS && has_high) high += to_float(bias[row + 8]);
#if LORA_RANK > 0
                low += terms[i][0], high += terms[i][1];
#endif
#if GATED
                // The lane of an even row takes that and the next one, its neighbour the two that are 8 further.
                const bool is_gate = g % 2 == 0;
                const float other = __shfl_xor_sync(0xffffffffu, is_gate ? high : low, 4);
                const float value = is_gate ? gated<EPILOGUE == 4>(low, other) : gated<EPILOGUE == 4>(other, high);
                if (token < count && (is_gate ? has_low : has_high))
                    ((half_t*)output)[(u64)token * (ROWS / 2) + (is_gate ? row : row + 7) / 2] = to_half(value);
#else
                if (token >= count) continue;
                const u64 place = (u64)token * ROWS + row;
#if EPILOGUE == 1
                if (has_low) ((float*)output)[place] += low;
                if (has_high) ((float*)output)[place + 8] += high;
#elif EPILOGUE == 3
                if (has_low) ((float*)output)[place] = to_logit(low);
                if (has_high) ((float*)output)[place + 8] = to_logit(high);
#else
                if (has_low) ((half_t*)output)[place] = to_half(low);
                if (has_high) ((half_t*)output)[place + 8] = to_half(high);
#endif
#endif
            }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gemm_packed(const unsigned char* weights, const half_t* input, void* output, const Chunk* chunk, float* partial, u32* counters,
                const half_t* bias LORA_PARAMETERS) {
    extern __shared__ uint4 shared[];  // stages of X, sum_offsets of each, the rings; afterwards the sums
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
    const int count = load_chunk(chunk).count, first_token = blockIdx.x * TOKENS, tokens = min(count - first_token, TOKENS);
    const int first_band = BANDS * blockIdx.z / gridDim.z, bands = BANDS * (blockIdx.z + 1) / gridDim.z - first_band;
    const int first_group = GROUPS * blockIdx.y / SPLITS, groups = GROUPS * (blockIdx.y + 1) / SPLITS - first_group;
    const int first_tile = (first_band + row_warp) * BAND;
    const bool works = row_warp < bands;
    uint4* x = shared;
    float* offsets = (float*)(x + BUFFERS * STAGE * TOKENS * UNITS);
    unsigned char* ring = (unsigned char*)(offsets + BUFFERS * STAGE * PARTS * SUMS * TOKENS) + warp * DEPTH * SLOT;

    // CTAs take the stages from another one on, or all would want the same part of X from the same part of the L2 cache.
    const int stages = (groups + STAGE - 1) / STAGE, turn = blockIdx.z % stages;
    const auto stage_start = [&](int stage) { return (stage + turn < stages ? stage + turn : stage + turn - stages) * STAGE; };
    const auto load_stage = [&](int stage) {
        if (stage >= stages) return;
        const int start = stage_start(stage);
        const int column = (first_group + start) * GROUP;
        load_input(x + stage % BUFFERS * (STAGE * TOKENS * UNITS), input + (u64)first_token * COLS + column,
                   min(STAGE, groups - start), tokens, COLS - column);
    };
    // The tiles of this warp: of each stage groups k_warp, k_warp + K_WARPS, …
#if BITS == 16
    constexpr int ROW_BYTES = COLS * 2;
    const unsigned char* own = weights + (u64)(first_tile * TILE + g) * ROW_BYTES + (first_group + k_warp) * (GROUP * 2) + 16 * t;
#else
    const unsigned char* own = weights + first_tile * STRIP_BYTES + (first_group + k_warp) * TILE_BYTES + 16 * lane;
#endif
    int next_stage = 0, next_share = 0;
    const auto load = [&](unsigned char* slot) {
        if (works && next_stage < stages) {
            const int group = stage_start(next_stage) + next_share * K_WARPS;
            if (group + k_warp < groups) {
#pragma unroll
                for (int b = 0; b < BAND; ++b) {
                    if (TILES % BAND != 0 && first_tile + b >= TILES) break;
                    const u32 target = shared_address(slot) + b * TILE_BYTES + 16 * lane;
#if BITS == 16
                    const unsigned char* source = own + (u64)b * TILE * ROW_BYTES + group * (GROUP * 2);
                    const int row = (first_tile + b) * TILE + g, column = (first_group + k_warp + group) * GROUP + 8 * t;
#pragma unroll
                    for (int piece = 0; piece < 2 * PIECES; ++piece) {
                        const int down = piece / PIECES * 8, right = piece % PIECES * 32;  // rows and columns from the first
                        const bool has = (ROWS % TILE == 0 || row + down < ROWS) && (COLS % GROUP == 0 || column + right < COLS);
                        copy16_async(target + 512 * piece, has ? source + down * ROW_BYTES + 2 * right : weights, has ? 16 : 0);
                    }
#else
                    const unsigned char* source = own + b * STRIP_BYTES + group * TILE_BYTES;
#pragma unroll
                    for (int unit = 0; unit < SCALES; unit += 32) copy16_async(target + 16 * unit, source + 16 * unit);
                    if (lane < SCALE_UNITS) copy16_async(target + 16 * SCALES, source + 16 * SCALES);
#endif
                }
            }
            if (++next_share == SHARE) next_share = 0, ++next_stage;
        }
        commit_copies();
    };
    let_next_start();
#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) load(ring + slot * SLOT);
    const Lora lora{LORA_ARGUMENTS};
#if LORA_RANK > 0
    __shared__ __align__(8) int lora_adapters_here[TOKENS];  // behind the barrier of the first stage
    for (int token = warp; token < TOKENS; token += WARPS) {
        const int adapter = token < tokens ? (int)load4(lora.adapters + first_token + token) : -1;  // uploaded before the step
        if (lane == 0) lora_adapters_here[token] = adapter;
        const int first_row = min(first_band * BAND * TILE, ROWS), rows = min(bands * BAND * TILE, ROWS - first_row);
        if (blockIdx.y == 0 && adapter >= 0) prefetch_rows(lora.b, adapter, first_row, rows, lane, 32);
    }
#else
    constexpr int* lora_adapters_here = nullptr;
#endif
    wait_for_previous();
#pragma unroll
    for (int stage = 0; stage < BUFFERS; ++stage) {
        load_stage(stage);
        commit_copies();
    }

    const Patterns patterns((u32)count >> 31);
    float2 whole[BAND];
#pragma unroll
    for (int b = 0; b < BAND; ++b) whole[b] = row_scales(weights, works ? first_tile + b : TILES, g);
    float sums[BAND][EIGHTS_OF_TOKENS][4] = {};
    unsigned char* slot = ring;
    const auto refill = [&]() {  // the slot is read: it is for other tiles, and the next one's turn comes
        load(slot);
        slot = slot == ring + (DEPTH - 1) * SLOT ? ring : slot + SLOT;
    };
    for (int stage = 0; stage < stages; ++stage) {
        if (stage == 0) wait_copies<BUFFERS - 1>();
        else wait_copies<(SHARE < DEPTH ? SHARE : DEPTH) - 1>();
        __syncthreads();  // this stage is there, the one before is read
        if (BUFFERS > 1 && stage > 0) load_stage(stage - 1 + BUFFERS);  // with the next tiles
        const uint4* stage_x = x + stage % BUFFERS * (STAGE * TOKENS * UNITS);
        float* stage_offsets = offsets + stage % BUFFERS * (STAGE * PARTS * SUMS * TOKENS);
        const int start = stage_start(stage);
        if (HAS_SUMS) sum_offsets(stage_offsets, stage_x, min(STAGE, groups - start));
        for (int share = 0; share < SHARE; ++share) {
            const int group = share * K_WARPS + k_warp;
            wait_copies<DEPTH - 1>();
            __syncwarp();  // the scales were copied by other lanes
            if (!works || start + group >= groups) {
                refill();
                continue;
            }
            uint4 top[BAND][PIECES], bottom[BAND][PIECES];
            const BlockScales blocks[BAND] = {{slot, lane}, {slot + TILE_BYTES, lane}};
            float group_sums[BAND][EIGHTS_OF_TOKENS][4];
            const auto sums_at = [&](int part, int number, int n) {  // of sum_offsets
                return *(const float2*)(stage_offsets + ((group * PARTS + part) * SUMS + number) * TOKENS + 8 * n + 2 * t);
            };
#pragma unroll
            for (int eight = 0; eight < 4; ++eight) {
                const int part = eight / PART_EIGHTS;
#pragma unroll
                for (int n = 0; n < EIGHTS_OF_TOKENS && eight % PART_EIGHTS == 0; ++n) {
                    float2 start = make_float2(0.f, 0.f);
                    if (HAS_SUMS) start = sums_at(part, 0, n);
#pragma unroll
                    for (int b = 0; b < BAND; ++b) {
                        group_sums[b][n][0] = group_sums[b][n][2] = start.x;
                        group_sums[b][n][1] = group_sums[b][n][3] = start.y;
                    }
                }
                u32 u[BAND][4], w[BAND][4];  // of rows g and g + 8
#pragma unroll
                for (int b = 0; b < BAND; ++b) {
                    if (eight % (4 / PIECES) == 0) {
                        const int p = eight * PIECES / 4;
                        const uint4* packed = (const uint4*)(slot + b * TILE_BYTES) + lane;
                        top[b][p] = packed[32 * p], bottom[b][p] = packed[32 * (PIECES + p)];
                    }
                    widen(u[b], top[b], eight, patterns), widen(w[b], bottom[b], eight, patterns);
                    blocks[b].apply(u[b], 0, eight), blocks[b].apply(w[b], 1, eight);
                }
#pragma unroll
                for (int n = 0; n < EIGHTS_OF_TOKENS; ++n) {
                    const uint4 v = read_input(stage_x, group, n, eight, g, t);
#pragma unroll
                    for (int b = 0; b < BAND; ++b) multiply(group_sums[b][n], u[b][0], w[b][0], u[b][1], w[b][1], v.x, v.y);
#pragma unroll
                    for (int b = 0; b < BAND; ++b) multiply(group_sums[b][n], u[b][2], w[b][2], u[b][3], w[b][3], v.z, v.w);
                }
                if (eight % PART_EIGHTS != PART_EIGHTS - 1) continue;
#pragma unroll
                for (int b = 0; b < BAND; ++b) {
#if PARTED
                    const PartScales scales(slot + b * TILE_BYTES, g);
                    const float2 scale = scales.scale(part);
#else
                    const float2 scale = group_scales(slot + b * TILE_BYTES, g);
#endif
#pragma unroll
                    for (int n = 0; n < EIGHTS_OF_TOKENS; ++n) {
#if ZEROS
                        const float2 zero = scales.zero(part), total = sums_at(part, 1, n);
#pragma unroll
                        for (int j = 0; j < 4; ++j) group_sums[b][n][j] -= (j < 2 ? zero.x : zero.y) * (j % 2 ? total.y : total.x);
#endif
#pragma unroll
                        for (int j = 0; j < 4; ++j) sums[b][n][j] += (j < 2 ? scale.x : scale.y) * group_sums[b][n][j];
                    }
                }
            }
            __syncwarp();
            refill();
        }
    }
    wait_copies<0>();
#pragma unroll
    for (int b = 0; b < BAND; ++b)
#pragma unroll
        for (int n = 0; n < EIGHTS_OF_TOKENS; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[b][n][j] *= j < 2 ? whole[b].x : whole[b].y;
    if (K_WARPS == 1) {
        if (works) finish<BAND>(first_tile, sums, output, count, partial, counters, bias, lora, lora_adapters_here);
        return;
    }
    __syncthreads();  // the shared memory is free

    float4* parts = (float4*)shared + lane;  // [K_WARPS][ROW_WARPS * BAND][EIGHTS_OF_TOKENS][32]
#pragma unroll
    for (int b = 0; b < BAND; ++b)
#pragma unroll
        for (int n = 0; n < EIGHTS_OF_TOKENS; ++n)
            parts[((warp * BAND + b) * EIGHTS_OF_TOKENS + n) * 32] = make_float4(sums[b][n][0], sums[b][n][1], sums[b][n][2], sums[b][n][3]);
    __syncthreads();
    for (int place = warp; place < bands * BAND; place += WARPS) {
        const int tile = first_band * BAND + place;
        if (TILES % BAND != 0 && tile >= TILES) break;
#pragma unroll
        for (int n = 0; n < EIGHTS_OF_TOKENS; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[0][n][j] = 0.f;
#pragma unroll
            for (int k = 0; k < K_WARPS; ++k)
                add(sums[0][n], parts[((k * ROW_WARPS * BAND + place) * EIGHTS_OF_TOKENS + n) * 32]);
        }
        finish<1>(tile, sums, output, count, partial, counters, bias, lora, lora_adapters_here);
    }
}

// GEMV with quantized weights: y = W x for one vector or up to eight, W in packed tiles of 4- or 8-bit values (packed.cuh), multiplied
// in tensor cores. A second kernel dequantizes W to 16 bits for prefill.
//
// W is [ROWS][COLS] in packed tiles of integers or small floats. The eight columns of the B operand are the TOKENS vectors, the last
// one again in those that are left, so no sum over lanes is left to do. x is [TOKENS][COLS], y [TOKENS][rows]; a vector's sums are
// added in the same order however many there are.
//
// As in gemv.cu, K_WARPS warps divide the columns and each warp copies its tiles through its own ring of DEPTH stages in shared
// memory, filled before the kernel waits for the kernel that computes x. NORM: x is one float32 vector and RMS-normalised
// first, then rounded to 16 bits. ORDERED: column c of x meets column places[c] of W, int32 [COLS].
#include "epilogue.cuh"
#include "experts.cuh"
#include "packed.cuh"

static_assert(!ORDERED || TOKENS == 1, "unsupported");
static_assert(TOKENS == 1 || (TOKENS <= 8 && !NORM && !LORA_RANK), "unsupported");

constexpr int WARPS = K_WARPS * ROW_WARPS, THREADS = 32 * WARPS;
constexpr int WARP_GROUPS = (GROUPS + K_WARPS - 1) / K_WARPS;  // of each tile
constexpr int SEGMENT_SHARES = (64 / TOKENS / K_WARPS + ROW_WARPS - 1) / ROW_WARPS;  // tiles of a warp between two barriers
constexpr int SEGMENT_TILES = (SEGMENT_SHARES > 1 ? SEGMENT_SHARES : 1) * ROW_WARPS;
constexpr int SEGMENT = SEGMENT_TILES * TILE;
static_assert(SEGMENT_TILES % ROW_WARPS == 0, "unsupported shape");

constexpr int EIGHTS = COLS / 8;                                 // of the columns
constexpr int PLACES = GROUPS * UNITS;                           // for them in shared memory, the last group filled up
constexpr int COLUMNS = TOKENS == 1 ? 1 : 2;                     // of C that a lane has and are wanted
constexpr int OWN = (PLACES + THREADS - 1) / THREADS;            // places of a thread
static_assert(ROWS % GRAIN == 0, "unsupported shape");

struct NormWeights {  // this thread's; nothing without NORM
    uint4 eights[OWN];

    __device__ __forceinline__ void load(const half_t* norm_weight) {
#if NORM
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int piece = threadIdx.x + i * THREADS;
            if (piece < EIGHTS) eights[i] = *(const uint4*)(norm_weight + 8 * piece);
        }
#endif
    }
};

// Where eight columns of x lie in shared memory.
__device__ __forceinline__ int input_place(int piece) {
    return IN_ORDER ? piece : piece / 16 * 16 + piece % 4 * 4 + piece % 16 / 4;
}

constexpr int PART_UNITS = UNITS / PARTS;  // of the columns that share a scale
constexpr int SUMS = GROUPS * PARTS * (1 + ZEROS);  // of a vector: what OFFSETS add in each part, and with ZEROS its values' sum
#if PARTED  // too many for static shared memory
constexpr int SUM_UNITS = (TOKENS * SUMS + 3) / 4;
#else
constexpr int SUM_UNITS = 0;
#endif

// This thread's part of the rows of A whose sums its CTA makes.
struct LoraColumns {
#if LORA_RANK > 0
    uint4 eights[OWN];  // of the first one

    __device__ __forceinline__ void load(const GemvLora& lora) {
        if (!lora.makes(0)) return;
        const uint4* row = lora.a_row(lora.sum_of(0));
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if (threadIdx.x + i * THREADS < EIGHTS) eights[i] = row[threadIdx.x + i * THREADS];
    }

    __device__ __forceinline__ void make_sums(const GemvLora& lora, const uint4* x) const {
        __shared__ float dots[GemvLora::ROUNDS][WARPS];
        if (!lora.makes(0)) return;
        for (int round = 0; lora.makes(round); ++round) {
            const uint4* row = lora.a_row(lora.sum_of(round));
            float dot = 0.f;
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int piece = threadIdx.x + i * THREADS;
                if (piece >= EIGHTS) continue;
                float w[8], v[8];
                unpack8(round == 0 ? eights[i] : row[piece], w);
                unpack8(x[input_place(piece)], v);
#pragma unroll
                for (int j = 0; j < 8; ++j) dot += w[j] * v[j];
            }
            dot = group_sum<32>(dot);
            if (threadIdx.x % 32 == 0) dots[round][threadIdx.x / 32] = dot;
        }
        if (!gather_in_last_warp<WARPS>()) return;
        const int lane = threadIdx.x % 32;
        for (int round = 0; lora.makes(round); ++round) {
            const float total = group_sum<32>(lane < WARPS ? dots[round][lane] : 0.f);
            if (lane == 0) lora.store(lora.sum_of(round), total);
        }
    }
#else
    __device__ __forceinline__ void load(const GemvLora&) {}
    __device__ __forceinline__ void make_sums(const GemvLora&, const uint4*) const {}
#endif
};

// What OFFSETS add to the product of eight weights and these values.
__device__ __forceinline__ float offset_of(uint4 values) {
    float v[8], offset = 0.f;
    unpack8(values, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) offset += OFFSETS[j / 2] * v[j];
    return offset;
}

__device__ __forceinline__ float sum_of(uint4 values) {
    float v[8], sum = 0.f;
    unpack8(values, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j];
    return sum;
}

// Where four lanes meet no bank that those of the next vector meet.
__device__ __forceinline__ int turned(int place, int token) { return place ^ (token & 1) << 2; }

// x to shared memory in the order the multiplications read it, [TOKENS][GROUPS][4 eights][4 lanes t][8], zeros beyond COLS, and what
// OFFSETS add to the sum of each group and part, [TOKENS][SUMS]. As many vectors at once as registers allow, none of whose loads waits
// for another.
__device__ __forceinline__ void load_input(uint4* x, float (*offsets)[SUMS], const void* input, const NormWeights& norm
                                           PLACES_PARAMETER) {
    constexpr int MOST = 8 / OWN, AT_ONCE = MOST > TOKENS ? TOKENS : MOST > 1 ? MOST : 1;
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += AT_ONCE) {
        uint4 packed[AT_ONCE][OWN];
#if NORM
        __shared__ float sums[WARPS];
        float v[OWN][8], squares = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int piece = threadIdx.x + i * THREADS;
            const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
            const float4 a = piece < EIGHTS ? load16f((const float*)input + 8 * piece) : zero;
            const float4 b = piece < EIGHTS ? load16f((const float*)input + 8 * piece + 4) : zero;
            const float f[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) v[i][j] = f[j], squares += f[j] * f[j];
        }
        squares = group_sum<32>(squares);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
        __syncthreads();
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += sums[w];
        const float scale = rsqrtf(total / NORM_SIZE + NORM_EPS);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            packed[0][i] = make_uint4(0, 0, 0, 0);
            if (OWN * THREADS != EIGHTS && threadIdx.x + i * THREADS >= EIGHTS) continue;
            float g[8];
            unpack8(norm.eights[i], g);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[i][j] *= scale * offset_weight(g[j]);
            packed[0][i] = pack8(v[i]);
        }
#else
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int piece = threadIdx.x + i * THREADS;
                const bool inside = first + n < TOKENS && (OWN * THREADS == EIGHTS || piece < EIGHTS);
                packed[n][i] = inside ? load16((const half_t*)input + (u64)(first + n) * COLS + 8 * piece) : make_uint4(0, 0, 0, 0);
            }
#endif
#if ORDERED  // of one vector: each value goes to its place, then every thread takes up what it would have had
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int piece = threadIdx.x + i * THREADS;
            if (piece >= EIGHTS) continue;
            const int4 a = *(const int4*)(places + 8 * piece), b = *(const int4*)(places + 8 * piece + 4);
            const int own[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            const u32 pairs[4] = {packed[0][i].x, packed[0][i].y, packed[0][i].z, packed[0][i].w};
#pragma unroll
            for (int j = 0; j < 8; ++j)
                ((half_t*)(x + input_place(own[j] / 8)))[own[j] % 8] = (half_t)(pairs[j / 2] >> 16 * (j % 2));
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int piece = threadIdx.x + i * THREADS;
            if (piece < EIGHTS) packed[0][i] = x[input_place(piece)];
        }
#endif
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int piece = threadIdx.x + i * THREADS, token = first + n;
                const bool has_place = token < TOKENS && (OWN * THREADS == PLACES || piece < PLACES);
                if (has_place) x[token * PLACES + turned(input_place(piece), token)] = packed[n][i];
                const float offset = group_sum<PART_UNITS>(offset_of(packed[n][i]));
                if (has_place && piece % PART_UNITS == 0) offsets[token][piece / PART_UNITS * (1 + ZEROS)] = offset;
#if ZEROS
                const float sum = group_sum<PART_UNITS>(sum_of(packed[n][i]));
                if (has_place && piece % PART_UNITS == 0) offsets[token][piece / PART_UNITS * 2 + 1] = sum;
#endif
            }
    }
    __syncthreads();
}

// At most half of the registers of each of the four schedulers, or the next kernel would not fit beside it.
extern "C" __global__ void __launch_bounds__((THREADS + 127) / 128 * 128, 2)
    gemv_packed(const unsigned char* tiles, const void* input, const half_t* norm_weight, const half_t* bias, void* output
                    GEMV_LORA_PARAMETERS EXPERT_PARAMETERS PLACES_PARAMETER) {
    extern __shared__ uint4 shared[];  // x [TOKENS][PLACES], SUM_UNITS, then the rings [WARPS][DEPTH][TILE_BYTES / 16]
#if PARTED
    __shared__ float partial[2][TOKENS * K_WARPS][SEGMENT];
    float(*offsets)[SUMS] = (float(*)[SUMS])(shared + TOKENS * PLACES);
#else
    __shared__ float partial[2][TOKENS * K_WARPS][SEGMENT], offsets[TOKENS][SUMS];
#endif
    using Terms = LoraTerms<SEGMENT, THREADS, TILE>;
    __shared__ float lora_terms[Terms::SEGMENTS][Terms::SIZE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k_warp = warp % K_WARPS, row_warp = warp / K_WARPS;
#ifdef EXPERTS_PER_TOKEN
    find_expert(picked, tiles, (u64)TILES * STRIP_BYTES, input, output);
#endif
    const int first_tile = (int)((u64)TILES * CTA / CTAS);
    const int num_tiles = (int)((u64)TILES * (CTA + 1) / CTAS) - first_tile;
    const int first_group = k_warp * WARP_GROUPS;
    uint4* x = shared;
    uint4* ring = shared + TOKENS * PLACES + SUM_UNITS + warp * DEPTH * (TILE_BYTES / 16);

    // The tiles of this warp: its groups of each of its rows of tiles, one after the other.
    const int own_groups = min(WARP_GROUPS, GROUPS - first_group);
    int left = max(0, (num_tiles - row_warp + ROW_WARPS - 1) / ROW_WARPS) * own_groups, next_group = 0;
    const uint4* next = (const uint4*)(tiles + (first_tile + row_warp) * STRIP_BYTES + first_group * TILE_BYTES) + lane;
    auto load = [&](uint4* slot) {
        if (left > 0) {
#pragma unroll
            for (int i = 0; i < SCALES; i += 32) copy16_async(slot + i + lane, next + i);
            if (lane < SCALE_UNITS) copy16_async(slot + SCALES + lane, next + SCALES);
            --left;
            next += TILE_BYTES / 16;
            if (++next_group == own_groups) next_group = 0, next += (ROW_WARPS * STRIP_BYTES - own_groups * TILE_BYTES) / 16;
        }
        commit_copies();
    };
    let_next_start();
    const GemvLora lora{GEMV_LORA_ARGUMENTS};
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) load(ring + stage * (TILE_BYTES / 16));
    NormWeights norm;
    norm.load(norm_weight);
    LoraColumns columns;
    columns.load(lora);
#if ORDERED
    for (int piece = threadIdx.x; piece < EIGHTS; piece += THREADS) prefetch(places + 8 * piece);
#endif
    const int num_rows = ROWS % TILE == 0 ? num_tiles * TILE : min(num_tiles * TILE, ROWS - first_tile * TILE);
    Terms terms;
    terms.fetch(lora, first_tile * TILE, num_rows);
    wait_for_previous();
    Segment<SEGMENT, THREADS> rows;
    rows.begin(first_tile * TILE, num_rows, bias, output);
#if ORDERED
    load_input(x, offsets, input, norm, places);
#else
    load_input(x, offsets, input, norm);
#endif
    columns.make_sums(lora, x);

    uint4* slot = ring;
    for (int segment = 0; segment * SEGMENT_TILES < num_tiles; ++segment) {
        float(*sums)[SEGMENT] = partial[segment % 2];
        const int first = segment * SEGMENT;
        if (segment > 0) rows.begin(first_tile * TILE + first, num_rows - first, bias, output);
        for (int tile = row_warp; tile < SEGMENT_TILES; tile += ROW_WARPS) {
            if (segment * SEGMENT_TILES + tile >= num_tiles) break;
            float low[COLUMNS] = {}, high[COLUMNS] = {};  // of rows lane / 4 and lane / 4 + 8
            const float2 whole = row_scales(tiles, first_tile + segment * SEGMENT_TILES + tile, lane / 4);
            const int token = TOKENS == 1 ? 0 : min(lane / 4, TOKENS - 1), turn = (token & 1) << 2;
            const uint4* group_x = x + token * PLACES + first_group * 16 + lane % 4;
            for (int i = 0; i < own_groups; ++i, group_x += 16) {
                wait_copies<DEPTH - 1>();
                __syncwarp();  // the scales were copied by other lanes
                uint4 top[PIECES], bottom[PIECES];
#pragma unroll
                for (int p = 0; p < PIECES; ++p) top[p] = slot[32 * p + lane], bottom[p] = slot[32 * (PIECES + p) + lane];
#if PARTED
                const PartScales scales(slot, lane / 4);
                const BlockScales blocks(slot, lane);
                // Of one of this lane's vectors; number 0 is what OFFSETS add, number 1 the values' sum.
                const auto sum_at = [&](int part, int number, int n) {
                    const int place = ((first_group + i) * PARTS + part) * (1 + ZEROS) + number;
                    return offsets[TOKENS == 1 ? 0 : min(lane % 4 * 2 + n, TOKENS - 1)][place];
                };
                float offset, next_offset;
#else
                const float2 scale = group_scales(slot, lane / 4);
                const BlockScales blocks(slot, lane);
                const auto offset_at = [&](int n) { return offsets[min(lane % 4 * 2 + n, TOKENS - 1)][first_group + i]; };
                const float offset = TOKENS == 1 ? offsets[0][first_group + i] : offset_at(0);
                const float next_offset = TOKENS == 1 ? offset : offset_at(1);
#endif
                float even[4], odd[4];
#pragma unroll
                for (int eight = 0; eight < 4; ++eight) {
                    const uint4 v = group_x[TOKENS == 1 ? 4 * eight : 4 * eight ^ turn];
                    u32 u[4], w[4];
                    widen(u, top, eight);
                    widen(w, bottom, eight);
                    blocks.apply(u, 0, eight), blocks.apply(w, 1, eight);
                    if (eight % PART_EIGHTS == 0) {
#if PARTED
                        offset = sum_at(eight / PART_EIGHTS, 0, 0);
                        next_offset = TOKENS == 1 ? offset : sum_at(eight / PART_EIGHTS, 0, 1);
#endif
                        multiply_first(even, u[0], w[0], u[1], w[1], v.x, v.y, -offset, -next_offset);
                        multiply_first(odd, u[2], w[2], u[3], w[3], v.z, v.w, 0.f, 0.f);
                    } else {
                        multiply(even, u[0], w[0], u[1], w[1], v.x, v.y);
                        multiply(odd, u[2], w[2], u[3], w[3], v.z, v.w);
                    }
#if PARTED
                    if (eight % PART_EIGHTS != PART_EIGHTS - 1) continue;
                    const float2 scale = scales.scale(eight / PART_EIGHTS), zero = scales.zero(eight / PART_EIGHTS);
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) {
                        const float sum = ZEROS ? sum_at(eight / PART_EIGHTS, ZEROS, j) : 0.f;
                        low[j] += scale.x * (even[j] + odd[j] - zero.x * sum);
                        high[j] += scale.y * (even[2 + j] + odd[2 + j] - zero.y * sum);
                    }
#endif
                }
#if !PARTED
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) {
                    low[j] += scale.x * (even[j] + odd[j]);
                    high[j] += scale.y * (even[2 + j] + odd[2 + j]);
                }
#endif
                __syncwarp();
                load(slot);
                slot = slot == ring + (DEPTH - 1) * (TILE_BYTES / 16) ? ring : slot + TILE_BYTES / 16;
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int column = TOKENS == 1 ? 0 : lane % 4 * 2 + j;
                if (TOKENS == 1 ? lane % 4 == 0 : column < TOKENS) {
                    float* own = sums[column * K_WARPS + k_warp] + tile * TILE + lane / 4;
                    own[0] = low[j] * whole.x;
                    own[8] = high[j] * whole.y;
                }
            }
        }
        terms.make(lora, first_tile * TILE + first, num_rows - first, lora_terms[segment % Terms::SEGMENTS]);
        __syncthreads();
        rows.end(first_tile * TILE + first, num_rows - first, sums, 1.f, output, lora, lora_terms[segment % Terms::SEGMENTS]);
    }
    wait_copies<0>();
}

// weight [ROWS][COLS] 16-bit, rounded once. One warp per tile; the rows pass through shared memory, so that each store writes
// whole lines of two of them.
extern "C" __global__ void __launch_bounds__(32 * DEQUANTIZE_WARPS) dequantize_packed(const uint4* tiles, half_t* weight) {
    __shared__ uint4 shared[DEQUANTIZE_WARPS][TILE * UNITS];
    const u64 tile = (u64)blockIdx.x * DEQUANTIZE_WARPS + threadIdx.x / 32;
    if (tile >= (u64)TILES * GROUPS) return;
    const int lane = threadIdx.x % 32;
    const uint4* source = tiles + (tile / GROUPS * STRIP_BYTES + tile % GROUPS * TILE_BYTES) / 16;
    uint4* rows = shared[threadIdx.x / 32];
#if PARTED
    const PartScales parts(source, lane / 4);
#else
    const float2 group = group_scales(source, lane / 4), whole = row_scales((const unsigned char*)tiles, (int)(tile / GROUPS), lane / 4);
#endif
    const BlockScales blocks(source, lane);
    // Where a row's units lie: eight lanes meet no bank twice.
    const auto place = [](int row, int unit) {
        return row * UNITS + (unit ^ (IN_ORDER ? 4 * (row % 2) : unit / 8 + 2 * (row % 2)));
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
#if !PARTED
        const float scale = half ? group.y * whole.y : group.x * whole.x;
#endif
        uint4 pieces[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; ++p) pieces[p] = source[32 * (PIECES * half + p) + lane];
#pragma unroll
        for (int eight = 0; eight < 4; ++eight) {
            float v[8];
            u32 pairs[4];
            widen(pairs, pieces, eight);
            blocks.apply(pairs, half, eight);
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const float2 f = unpack2(pairs[pair]);
#if PARTED
                const float2 scales = parts.scale(eight / PART_EIGHTS), zeros = parts.zero(eight / PART_EIGHTS);
                const float scale = half ? scales.y : scales.x, zero = half ? zeros.y : zeros.x;
                v[2 * pair] = (f.x - OFFSETS[pair] - zero) * scale, v[2 * pair + 1] = (f.y - OFFSETS[pair] - zero) * scale;
#else
                v[2 * pair] = (f.x - OFFSETS[pair]) * scale, v[2 * pair + 1] = (f.y - OFFSETS[pair]) * scale;
#endif
            }
            rows[place(row, IN_ORDER ? 4 * eight + lane % 4 : lane % 4 * 4 + eight)] = pack8(v);
        }
    }
    __syncwarp();
    uint4* target = (uint4*)(weight + tile / GROUPS * TILE * COLS + tile % GROUPS * GROUP);
#pragma unroll
    for (int i = 0; i < TILE * UNITS; i += 32) {
        const int row = (i + lane) / UNITS, unit = lane % UNITS;
        const bool has_row = ROWS % TILE == 0 || tile / GROUPS * TILE + row < ROWS;
        const bool has_unit = COLS % GROUP == 0 || tile % GROUPS * UNITS + unit < EIGHTS;
        if (has_row && has_unit) target[row * (COLS / 8) + unit] = rows[place(row, unit)];
    }
}

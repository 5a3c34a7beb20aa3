// Y = X Wᵀ for a few tokens, with W in 4 or 8 bits (packed.cuh): each CTA reads its tiles of W once for TOKENS of them, so that a
// short prompt takes little longer than a decode step. X [count][COLS] and Y [count][ROWS] are row-major. Y is 16-bit or, with
// ACCUMULATE, float32 and added to. Grid: (tiles of TOKENS, SPLITS, tiles of ROWS).
//
// The columns are split over SPLITS CTAs, so that each has more rows and X is read less often; the last of them to finish adds
// up their sums, ``partial`` [grid][CTA_ROWS * TOKENS]; counters: uint32 [tiles of ROWS][tiles of TOKENS], 0 between launches.
// A CTA has ROW_WARPS rows of warps with WARP_TILES tiles of 16 rows each, and K_WARPS of them along the columns, whose sums
// are added up in shared memory at the end. Its ring has DEPTH stages, of a group of 128 columns for each of the K_WARPS: X, then
// the records. Of X the 16-byte units of a row lie in the order they are read in: unit 4 t + eight at 4 eight + t.
#include "packed.cuh"

constexpr int WARPS = ROW_WARPS * K_WARPS, THREADS = 32 * WARPS;
constexpr int CTA_TILES = ROW_WARPS * WARP_TILES, CTA_ROWS = CTA_TILES * TILE;
constexpr int CTA_GROUPS = (GROUPS + SPLITS - 1) / SPLITS, STEPS = (CTA_GROUPS + K_WARPS - 1) / K_WARPS;  // at most
constexpr int ROW_BYTES = GROUP * 2, INPUT_BYTES = TOKENS * ROW_BYTES;
constexpr int SLICE_BYTES = INPUT_BYTES + CTA_TILES * RECORD, STAGE_BYTES = K_WARPS * SLICE_BYTES;  // as in linear_packed.py
constexpr int EIGHTS_OF_TOKENS = TOKENS / 8;
constexpr int PITCH = TOKENS + 1;  // floats of a row of sums
static_assert(TOKENS % 8 == 0 && (K_WARPS < 16 || ROW_WARPS == 1), "unsupported shape");

__device__ __forceinline__ int unit_place(int token, int eight, int t) { return (4 * eight + t) ^ (token & 1) << 2; }

// The ROW_WARPS warps that share a slice of a stage wait for each other.
__device__ __forceinline__ void sync_slice(int k_warp) {
    if (ROW_WARPS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(k_warp + 1), "n"(32 * ROW_WARPS) : "memory");
}

struct Loader {  // of a warp: its tiles' records, and its share of the tokens of its slice
    u32 slices;                    // shared address of the slice of its k_warp in the first stage
    const unsigned char* records;  // this lane's first 16 bytes of the warp's first tile and of the CTA's first group
    const half_t* input;           // this lane's unit of the warp's first pair of tokens, of that group
    int row_warp, k_warp, lane, tiles, tokens, groups;  // tiles, tokens and groups there are
    int turn;  // CTAs begin at different groups, or all would want the same part of X from the same part of the L2 cache

    __device__ __forceinline__ int group(int step) const {
        step += turn;
        return (step < STEPS ? step : step - STEPS) * K_WARPS + k_warp;
    }
    __device__ __forceinline__ bool has(int step) const { return GROUPS % (SPLITS * K_WARPS) == 0 || group(step) < groups; }

    __device__ __forceinline__ void load_records(int step, int stage) const {
        if (!has(step)) return;
        const u32 target = slices + stage * STAGE_BYTES + INPUT_BYTES + row_warp * WARP_TILES * RECORD + 16 * lane;
        const unsigned char* source = records + group(step) * RECORD;
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) {
            if (ROWS % (CTA_TILES * TILE) != 0 && i >= tiles) break;
#pragma unroll
            for (int unit = 0; unit < SCALES; unit += 32) copy16_async(target + i * RECORD + 16 * unit, source + i * GROUPS * RECORD + 16 * unit);
            if (lane < 2) copy16_async(target + i * RECORD + 16 * SCALES, source + i * GROUPS * RECORD + 16 * SCALES);
        }
    }

    __device__ __forceinline__ void load_input(int step, int stage) const {  // two tokens at a time
        if (!has(step)) return;
        const int odd = lane / 16, unit = lane % 16;
        const u32 target = slices + stage * STAGE_BYTES + (2 * row_warp + odd) * ROW_BYTES + 16 * unit_place(odd, unit % 4, unit / 4);
        const half_t* source = input + group(step) * GROUP;
#pragma unroll
        for (int pair = 0; pair < TOKENS / 2; pair += ROW_WARPS) {
            if (TOKENS / 2 % ROW_WARPS != 0 && pair + row_warp >= TOKENS / 2) break;
            const bool inside = 2 * (pair + row_warp) + odd < tokens;  // else zeros, but copied from somewhere
            copy16_async(target + pair * 2 * ROW_BYTES, inside ? source + pair * 2 * COLS : source, inside ? 16 : 0);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    gemm_packed(const unsigned char* records, const half_t* input, void* output, int count, float* partial, u32* counters) {
    extern __shared__ uint4 shared[];  // the ring; afterwards the sums, [K_WARPS][CTA_ROWS][PITCH]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
    const int first_token = blockIdx.x * TOKENS, tokens = count - first_token;
    const int first_tile = blockIdx.z * CTA_TILES + row_warp * WARP_TILES;
    const int first_group = GROUPS * blockIdx.y / SPLITS;
    const int own_token = 2 * row_warp + lane / 16;
    Loader loader;
    loader.slices = shared_address(shared) + k_warp * SLICE_BYTES;
    loader.records = records + ((u64)first_tile * GROUPS + first_group) * RECORD + 16 * lane;
    loader.input = input + (u64)(first_token + (own_token < tokens ? own_token : 0)) * COLS + first_group * GROUP + 8 * (lane % 16);
    loader.row_warp = row_warp, loader.k_warp = k_warp, loader.lane = lane;
    loader.tiles = TILES - first_tile, loader.tokens = tokens;
    loader.groups = GROUPS * (blockIdx.y + 1) / SPLITS - first_group, loader.turn = blockIdx.z % STEPS;
    let_next_start();
#pragma unroll
    for (int step = 0; step < DEPTH - 1; ++step) loader.load_records(step, step);
    wait_for_previous();
#pragma unroll
    for (int step = 0; step < DEPTH - 1; ++step) {
        loader.load_input(step, step);
        commit_copies();
    }

    float sums[WARP_TILES][EIGHTS_OF_TOKENS][4] = {};
    int stage = 0, next = DEPTH - 1;
    for (int step = 0; step < STEPS; ++step) {
        wait_copies<DEPTH - 2>();
        sync_slice(k_warp);  // this stage is there, and the one before is read
        if (step + DEPTH - 1 < STEPS) {
            loader.load_records(step + DEPTH - 1, next);
            loader.load_input(step + DEPTH - 1, next);
        }
        commit_copies();
        const char* slice = (char*)shared + stage * STAGE_BYTES + k_warp * SLICE_BYTES;
        stage = stage + 1 == DEPTH ? 0 : stage + 1, next = next + 1 == DEPTH ? 0 : next + 1;
        if (!loader.has(step)) continue;
        uint4 top[WARP_TILES][PIECES], bottom[WARP_TILES][PIECES];
        u32 scales[WARP_TILES][2];  // of rows g and g + 8, twice each
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) {
            const uint4* record = (const uint4*)(slice + INPUT_BYTES + (row_warp * WARP_TILES + i) * RECORD);
#pragma unroll
            for (int p = 0; p < PIECES; ++p) top[i][p] = record[32 * p + lane], bottom[i][p] = record[32 * (PIECES + p) + lane];
            const u32 both = ((const u32*)(record + SCALES))[g];
            scales[i][0] = __byte_perm(both, 0, 0x1010), scales[i][1] = __byte_perm(both, 0, 0x3232);
        }
#pragma unroll
        for (int eight = 0; eight < 4; ++eight) {
            uint4 x[EIGHTS_OF_TOKENS];
#pragma unroll
            for (int n = 0; n < EIGHTS_OF_TOKENS; ++n)
                x[n] = *(const uint4*)(slice + (8 * n + g) * ROW_BYTES + 16 * unit_place(g, eight, t));
#pragma unroll
            for (int i = 0; i < WARP_TILES; ++i) {
                u32 u[4], w[4];
                widen(u, top[i], eight);
                widen(w, bottom[i], eight);
                center(u);
                center(w);
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) u[pair] = multiply2(u[pair], scales[i][0]), w[pair] = multiply2(w[pair], scales[i][1]);
#pragma unroll
                for (int n = 0; n < EIGHTS_OF_TOKENS; ++n) multiply(sums[i][n], u[0], w[0], u[1], w[1], x[n].x, x[n].y);
#pragma unroll
                for (int n = 0; n < EIGHTS_OF_TOKENS; ++n) multiply(sums[i][n], u[2], w[2], u[3], w[3], x[n].z, x[n].w);
            }
        }
    }
    wait_copies<0>();
    __syncthreads();

    float* parts = (float*)shared;
#pragma unroll
    for (int i = 0; i < WARP_TILES; ++i)
#pragma unroll
        for (int n = 0; n < EIGHTS_OF_TOKENS; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = (row_warp * WARP_TILES + i) * TILE + g + j / 2 * 8;
                parts[(k_warp * CTA_ROWS + row) * PITCH + 8 * n + 2 * t + j % 2] = sums[i][n][j];
            }
    __syncthreads();
    const auto store = [&](int i, float sum) {
        const int token = i / CTA_ROWS, row = blockIdx.z * CTA_ROWS + i % CTA_ROWS;
        if (token >= tokens || row >= ROWS) return;
        const u64 place = (u64)(first_token + token) * ROWS + row;
#if ACCUMULATE
        ((float*)output)[place] += sum;
#else
        ((half_t*)output)[place] = to_half(sum);
#endif
    };
    const int place = blockIdx.z * gridDim.x + blockIdx.x;
    float* own = partial + ((u64)place * SPLITS + blockIdx.y) * (CTA_ROWS * TOKENS);
    for (int i = threadIdx.x; i < CTA_ROWS * TOKENS; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < K_WARPS; ++k) sum += parts[(k * CTA_ROWS + i % CTA_ROWS) * PITCH + i / CTA_ROWS];
        if (SPLITS == 1) store(i, sum);
        else own[i] = sum;
    }
    if (SPLITS == 1 || !is_last_to_arrive(counters + place, SPLITS)) return;
    const float* all = partial + (u64)place * SPLITS * (CTA_ROWS * TOKENS);
    for (int i = threadIdx.x; i < CTA_ROWS * TOKENS; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) sum += load4f(all + s * (CTA_ROWS * TOKENS) + i);
        store(i, sum);
    }
}

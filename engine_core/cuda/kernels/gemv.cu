// GEMV: y = W x for one vector. W is [ROWS][COLS] 16-bit, row-major; x is [COLS]; each CTA computes a contiguous share of the rows.
//
// The time of the kernel is the time to read W, so everything serves to keep loads in flight. K_WARPS warps divide the columns, so
// that each lane keeps its part of x in registers. Each lane copies its own 16-byte pieces of W through its own slots of a ring in
// shared memory (cp.async; DEPTH stages of BATCH rows), without registers and without barriers. The ring is filled before the
// kernel waits for the kernel that computes x.
//
// NORM: x is float32 and RMS-normalised on the way; the factor 1 / rms multiplies the sums. EPILOGUE, BIAS: see epilogue.cuh.
#include "epilogue.cuh"
#include "experts.cuh"

constexpr int CHUNK = 256;  // columns a warp takes at once: 8 per lane
constexpr int PARTS = (COLS + CHUNK * K_WARPS - 1) / (CHUNK * K_WARPS);  // chunks of a warp
constexpr int WARPS = K_WARPS * ROW_WARPS, THREADS = 32 * WARPS;
constexpr int SEGMENT = 64;                                      // rows of the CTA between two barriers
constexpr int SEGMENT_BATCHES = SEGMENT / (BATCH * ROW_WARPS);  // stages of a row-warp between two barriers
static_assert(BATCH == 1 || BATCH == 2 || BATCH == 4, "BATCH is 1, 2 or 4");
static_assert(COLS % 8 == 0 && ROWS % GRAIN == 0 && SEGMENT % (BATCH * ROW_WARPS) == 0, "unsupported shape");

struct Share {  // the rows of this CTA, as this warp walks them
    const half_t* weight;
    int begin, count, column, row_warp;

    __device__ __forceinline__ int row(int batch) const {  // of its first row, relative to begin
        return batch / SEGMENT_BATCHES * SEGMENT + (batch % SEGMENT_BATCHES * ROW_WARPS + row_warp) * BATCH;
    }

    __device__ __forceinline__ void load(uint4* slots, int batch) const {
#pragma unroll
        for (int r = 0; r < BATCH; ++r) {
            const int local = row(batch) + r;
            if (local < count) {
                const half_t* source = weight + (u64)(begin + local) * COLS;
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    const int c = column + p * CHUNK;
                    const bool inside = COLS % (CHUNK * K_WARPS) == 0 || c < COLS;
                    copy16_async(slots + (r * PARTS + p) * THREADS, source + (inside ? c : 0), inside ? 16 : 0);
                }
            }
        }
        commit_copies();
    }
};

struct NormWeights {  // this lane's; nothing without NORM
    uint4 parts[PARTS];

    __device__ __forceinline__ void load(const half_t* norm_weight, int column) {
#if NORM
#pragma unroll
        for (int p = 0; p < PARTS; ++p)
            if (column + p * CHUNK < COLS) parts[p] = *(const uint4*)(norm_weight + column + p * CHUNK);
#endif
    }
};

__device__ __forceinline__ float load_input(float x[PARTS][8], const void* input, const NormWeights& norm, int column) {
    float squares = 0.f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = column + p * CHUNK;
        if (c < COLS) {
#if NORM
            float g[8];
            unpack8(norm.parts[p], g);
            const float4 a = load16f((const float*)input + c), b = load16f((const float*)input + c + 4);
            const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) squares += v[j] * v[j], x[p][j] = v[j] * offset_weight(g[j]);
#else
            unpack8(load16((const half_t*)input + c), x[p]);
#endif
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) x[p][j] = 0.f;
        }
    }
    return squares;
}

__device__ __forceinline__ float norm_scale(const float* squares) {
    float total = 0.f;
    for (int k = 0; k < K_WARPS; ++k) total += squares[k];
    return rsqrtf(total / NORM_SIZE + NORM_EPS);
}

// This lane's part of the rows of A whose sums its CTA makes: the row-warps take them in turn.
struct LoraColumns {
#if LORA_RANK > 0
    uint4 parts[PARTS];  // of the first one

    __device__ __forceinline__ void load(const GemvLora& lora, const Share& share) {
        if (!lora.makes(share.row_warp)) return;
        const half_t* row = (const half_t*)lora.a_row(lora.sum_of(share.row_warp));
#pragma unroll
        for (int p = 0; p < PARTS; ++p)
            if (share.column + p * CHUNK < COLS) parts[p] = *(const uint4*)(row + share.column + p * CHUNK);
    }

    // squares: of x, [K_WARPS], written by now or by another warp.
    __device__ __forceinline__ void make_sums(const GemvLora& lora, const Share& share, const float (*x)[8], const float* squares) const {
        __shared__ float dots[GemvLora::ROUNDS][K_WARPS];
        if (!lora.makes(0)) return;
        for (int round = share.row_warp; lora.makes(round); round += ROW_WARPS) {
            const half_t* row = (const half_t*)lora.a_row(lora.sum_of(round));
            float dot = 0.f;
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                const int c = share.column + p * CHUNK;
                if (c >= COLS) continue;
                float w[8];
                unpack8(round < ROW_WARPS ? parts[p] : *(const uint4*)(row + c), w);
#pragma unroll
                for (int j = 0; j < 8; ++j) dot += w[j] * x[p][j];
            }
            dot = group_sum<32>(dot);
            if (threadIdx.x % 32 == 0) dots[round][threadIdx.x / 32 % K_WARPS] = dot;
        }
        if (!gather_in_last_warp<WARPS>()) return;
        const int lane = threadIdx.x % 32;
        const float scale = NORM ? norm_scale(squares) : 1.f;
        for (int round = 0; lora.makes(round); ++round) {
            const float total = group_sum<32>(lane < K_WARPS ? dots[round][lane] : 0.f);
            if (lane == 0) lora.store(lora.sum_of(round), scale * total);
        }
    }
#else
    __device__ __forceinline__ void load(const GemvLora&, const Share&) {}
    __device__ __forceinline__ void make_sums(const GemvLora&, const Share&, const float (*)[8], const float*) const {}
#endif
};

constexpr int SUM_LANES = 32 / BATCH;  // lanes that hold one of BATCH sums

// Sums BATCH values over the warp, halving the lanes a value is on at each step; lane i SUM_LANES gets the sum of acc[i].
__device__ __forceinline__ float batch_sum(const float* acc, int lane) {
    float v = acc[0];
    if constexpr (BATCH == 4) {
        const bool high = lane & 16, odd = lane & 8;
        const float v0 = (high ? acc[2] : acc[0]) + __shfl_xor_sync(0xffffffffu, high ? acc[0] : acc[2], 16);
        const float v1 = (high ? acc[3] : acc[1]) + __shfl_xor_sync(0xffffffffu, high ? acc[1] : acc[3], 16);
        v = (odd ? v1 : v0) + __shfl_xor_sync(0xffffffffu, odd ? v0 : v1, 8);
    } else if constexpr (BATCH == 2) {
        const bool high = lane & 16;
        v = (high ? acc[1] : acc[0]) + __shfl_xor_sync(0xffffffffu, high ? acc[0] : acc[1], 16);
    }
    return group_sum<SUM_LANES>(v);
}

#if LORA_RANK > 0  // as in gemv_packed.cu: at most half of the registers, or the next kernel would not fit beside it
#define BOUNDS THREADS, 2
#else
#define BOUNDS THREADS
#endif

extern "C" __global__ void __launch_bounds__(BOUNDS)
    gemv(const half_t* weight, const void* input, const half_t* norm_weight, const half_t* bias, void* output
             GEMV_LORA_PARAMETERS EXPERT_PARAMETERS) {
    extern __shared__ uint4 ring[];  // [DEPTH][BATCH][PARTS][THREADS]
    __shared__ float partial[2][K_WARPS][SEGMENT];
    __shared__ float squares[K_WARPS];
    using Terms = LoraTerms<SEGMENT, THREADS, GRAIN>;
    __shared__ float lora_terms[Terms::SEGMENTS][Terms::SIZE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k_warp = warp % K_WARPS;
#ifdef EXPERTS_PER_TOKEN
    find_expert(picked, weight, (u64)ROWS * COLS * sizeof(half_t), input, output);
#endif
    Share share;
    share.weight = weight;
    share.begin = (int)((u64)(ROWS / GRAIN) * CTA / CTAS) * GRAIN;
    share.count = (int)((u64)(ROWS / GRAIN) * (CTA + 1) / CTAS) * GRAIN - share.begin;
    share.column = k_warp * PARTS * CHUNK + lane * 8;
    share.row_warp = warp / K_WARPS;
    uint4* slots = ring + threadIdx.x;
    constexpr int STAGE = BATCH * PARTS * THREADS;

    let_next_start();
    const GemvLora lora{GEMV_LORA_ARGUMENTS};
#pragma unroll
    for (int stage = 0; stage < DEPTH; ++stage) share.load(slots + stage * STAGE, stage);
    NormWeights norm;
    norm.load(norm_weight, share.column);
    LoraColumns columns;
    columns.load(lora, share);
    Terms terms;
    terms.fetch(lora, share.begin, share.count);
    wait_for_previous();
    Segment<SEGMENT, THREADS> rows;
    rows.begin(share.begin, share.count, bias, output);
    float x[PARTS][8];
    const float own_squares = load_input(x, input, norm, share.column);
    if (NORM && share.row_warp == 0) {
        const float sum = group_sum<32>(own_squares);
        if (lane == 0) squares[k_warp] = sum;
    }
    columns.make_sums(lora, share, x, squares);

    int batch = 0, stage = 0;
    float scale = 1.f;
    for (int segment = 0; segment * SEGMENT < share.count; ++segment) {
        float(*sums)[SEGMENT] = partial[segment % 2];
        const int first = segment * SEGMENT;
        if (segment > 0) rows.begin(share.begin + first, share.count - first, bias, output);
        for (int i = 0; i < SEGMENT_BATCHES; ++i, ++batch) {
            wait_copies<DEPTH - 1>();
            const uint4* w = slots + stage * STAGE;
            float acc[BATCH] = {};
#pragma unroll
            for (int r = 0; r < BATCH; ++r)
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    float v[8];
                    unpack8(w[(r * PARTS + p) * THREADS], v);
#pragma unroll
                    for (int j = 0; j < 8; ++j) acc[r] += v[j] * x[p][j];
                }
            const float sum = batch_sum(acc, lane);
            share.load(slots + stage * STAGE, batch + DEPTH);
            stage = stage + 1 == DEPTH ? 0 : stage + 1;
            if (lane % SUM_LANES == 0) sums[k_warp][(i * ROW_WARPS + share.row_warp) * BATCH + lane / SUM_LANES] = sum;
            if (share.row(batch + 1) >= share.count) {
                ++batch;
                break;
            }
        }
        terms.make(lora, share.begin + first, share.count - first, lora_terms[segment % Terms::SEGMENTS]);
        __syncthreads();
        if (NORM && segment == 0) scale = norm_scale(squares);
        rows.end(share.begin + first, share.count - first, sums, scale, output, lora, lora_terms[segment % Terms::SEGMENTS]);
    }
    wait_copies<0>();
}

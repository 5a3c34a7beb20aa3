// Choosing the next token where the logits are; the steps and their order are those of engine_core/sampling.py.
//
// sample_scan, many CTAs: penalty, bias and mask give scores; the largest (first row on a tie) goes to state.best.
// sample_pick, one CTA: greedy takes it; else top-k and top-p by radix selection, min-p, then the inverse CDF in row order of
// a Philox4x32-10 draw (key: seed, counter: step). Weights are summed as 64-bit fixed point (2^44 = 1), so that no
// order of summation changes a token. The token goes to the state, for the next step, and to pinned host memory.
#include "common.cuh"

struct Params {
    double top_p;
    u64 seed;
    float temperature, min_p, penalty;
    int top_k;
    u32 has_bias, has_mask;
};

constexpr int SCAN_THREADS = 256, THREADS = 1024, WARPS = THREADS / 32;
constexpr int FAULT_NAN = -1, FAULT_EMPTY = -2;
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ u32 order_key(float v) {  // of any float but NaN, in the same order
    const u32 bits = __float_as_uint(v + 0.f);       // -0 becomes 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_order_key(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    sample_scan(const float* logits, const u32* seen, const float* bias, const u32* mask, const int* vocab_map,
                const Params* params, State* state, float* scores) {
    __shared__ u64 bests[SCAN_THREADS / 32];
    let_next_start();
    wait_for_previous();
    const float penalty = params->penalty;
    const bool has_bias = params->has_bias, has_mask = params->has_mask;
    u64 best = 0;
    bool has_nan = false;
    for (int row = blockIdx.x * SCAN_THREADS + threadIdx.x; row < ROWS; row += gridDim.x * SCAN_THREADS) {
        float v = load4f(logits + row);
        if (penalty != 1.f && load4(seen + row / 32) >> row % 32 & 1) v = v < 0.f ? v * penalty : v / penalty;
        if (has_bias) v += load4f(bias + row);
        if (has_mask) {
            const int id = vocab_map ? vocab_map[row] : row;
            if (!(load4(mask + id / 32) >> id % 32 & 1)) v = __uint_as_float(0xff800000u);
        }
        scores[row] = v;
        has_nan |= v != v;
        const u64 candidate = (u64)order_key(v) << 32 | (u32)~row;
        best = candidate > best ? candidate : best;
    }
    if (has_nan) atomicOr(&state->nan_seen, 1u);
    for (int offset = 16; offset > 0; offset /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, best, offset);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < SCAN_THREADS / 32; ++w) best = bests[w] > best ? bests[w] : best;
        if (best) atomicMax(&state->best, best);
    }
}

__device__ double uniform(u64 seed, u64 step) {
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32), c0 = (u32)step, c1 = (u32)(step >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0, h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return ((c0 >> 5) * 67108864.0 + (c1 >> 6)) / 9007199254740992.0;
}

__device__ __forceinline__ u64 fixed_point(float weight) { return (u64)(weight * 17592186044416.0); }

struct Selection {
    u32 threshold;  // key
    u64 above;      // mass of the larger keys
};

// The largest key whose mass, with that of all larger keys, reaches ``target`` (1 … total): three passes of 12, 10 and 10
// bits. ``item(row, key, mass)`` returns whether the row takes part. All threads call it.
template <typename Item>
__device__ Selection select(u64* histogram, u64 target, Item item) {
    __shared__ Selection found;
    Selection result = {0, 0};
    int shift = 20, bits = 12;
    while (true) {
        for (int i = threadIdx.x; i < 1 << bits; i += THREADS) histogram[i] = 0;
        __syncthreads();
        for (int row = threadIdx.x; row < ROWS; row += THREADS) {
            u32 key;
            u64 mass;
            if (item(row, key, mass) && (shift == 20 || key >> (shift + bits) == result.threshold >> (shift + bits)))
                atomicAdd(histogram + (key >> shift & ((1u << bits) - 1)), mass);
        }
        __syncthreads();
        if (threadIdx.x < 32) {  // one warp: 32 bins at a time, from the largest key down
            const int lane = threadIdx.x;
            u64 above = result.above;
            for (int top = (1 << bits) - 1; top >= 0; top -= 32) {
                u64 running = histogram[top - lane];
                const u64 own = running;
                for (int offset = 1; offset < 32; offset *= 2) {
                    const u64 other = __shfl_up_sync(ALL_LANES, running, offset);
                    if (lane >= offset) running += other;
                }
                const u32 reached = __ballot_sync(ALL_LANES, above + running >= target);
                if (reached) {
                    if (lane == __ffs(reached) - 1) found = {result.threshold | (u32)(top - lane) << shift, above + running - own};
                    break;
                }
                above += __shfl_sync(ALL_LANES, running, 31);
            }
        }
        __syncthreads();
        result = found;
        if (shift == 0) return result;
        shift -= 10, bits = 10;
    }
}

struct Filter {  // which rows are left, and their weights
    const float* scores;
    float peak, temperature, min_p;
    u32 least_key;   // top-k
    u32 least_bits;  // top-p: weight bits of the last of the nucleus …
    u32 num_ties;    // … and how many rows of that weight are in it, in row order

    __device__ __forceinline__ float weight(int row) const {  // negative: not among the top-k
        const float score = load4f(scores + row);
        return order_key(score) >= least_key ? expf((score - peak) / temperature) : -1.f;
    }
};

__device__ u64 block_sum(u64 value, u64* sums) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int w = 0; w < WARPS; ++w) value += sums[w];
    return value;
}

// The row at ``draw`` (in [0, 1)) of the cumulative weights, in row order. Each warp owns a run of rows.
__device__ int inverse_cdf(const Filter& filter, double draw, u64* sums, u32* ties) {
    __shared__ int chosen;
    constexpr int RUN = (ROWS + WARPS * 32 - 1) / (WARPS * 32) * 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * RUN, last = min(ROWS, first + RUN);
    u64 mass = 0;
    u32 tied = 0;
    for (int row = first + lane; row < last; row += 32) {
        const float w = filter.weight(row);
        if (w < filter.min_p || w < 0.f) continue;
        const u32 bits = __float_as_uint(w);
        if (bits > filter.least_bits) mass += fixed_point(w);
        tied += bits == filter.least_bits;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        mass += __shfl_xor_sync(ALL_LANES, mass, offset);
        tied += __shfl_xor_sync(ALL_LANES, tied, offset);
    }
    if (lane == 0) sums[warp] = mass, ties[warp] = tied;
    __syncthreads();
    const u64 tie_mass = fixed_point(__uint_as_float(filter.least_bits));
    u64 total = 0, before = 0;
    u32 ties_before = 0, all_ties = 0;
    for (int w = 0; w < WARPS; ++w) {
        const u32 kept = min(ties[w], filter.num_ties - min(filter.num_ties, all_ties));
        if (w == warp) before = total, ties_before = all_ties;
        all_ties += ties[w];
        total += sums[w] + kept * tie_mass;
        if (w == warp) mass = total - before;
    }
    const u64 target = (u64)(draw * (double)total);  // the chosen row is the first whose cumulative mass exceeds it
    if (before <= target && target < before + mass) {
        for (int base = first; base < last; base += 32) {
            const int row = base + lane;
            const float w = row < last ? filter.weight(row) : -1.f;
            const u32 bits = __float_as_uint(w);
            const bool left = w >= filter.min_p && w >= 0.f, is_tie = left && bits == filter.least_bits;
            const u32 tie_lanes = __ballot_sync(ALL_LANES, is_tie);
            const bool kept = left && (is_tie ? ties_before + __popc(tie_lanes & ((1u << lane) - 1)) < filter.num_ties
                                              : bits > filter.least_bits);
            ties_before += __popc(tie_lanes);
            u64 running = kept ? fixed_point(w) : 0;
            for (int offset = 1; offset < 32; offset *= 2) {
                const u64 other = __shfl_up_sync(ALL_LANES, running, offset);
                if (lane >= offset) running += other;
            }
            const u32 reached = __ballot_sync(ALL_LANES, before + running > target);
            if (reached) {
                if (lane == 0) chosen = base + __ffs(reached) - 1;
                break;
            }
            before += __shfl_sync(ALL_LANES, running, 31);
        }
    }
    __syncthreads();
    return chosen;
}

__device__ int draw_row(const float* scores, const Params& params, float peak, u64 step, u64* histogram, u64* sums, u32* ties) {
    Filter filter = {scores, peak, params.temperature, params.min_p, 0u, 0u, ALL_LANES};
    if (params.top_k > 0 && params.top_k < ROWS)
        filter.least_key = select(histogram, params.top_k, [&](int row, u32& key, u64& mass) {
            key = order_key(load4f(scores + row)), mass = 1;
            return true;
        }).threshold;
    if (params.top_p < 1.0) {
        u64 total = 0;
        for (int row = threadIdx.x; row < ROWS; row += THREADS) total += fixed_point(fmaxf(filter.weight(row), 0.f));
        total = block_sum(total, sums);
        // A row is kept while the mass before it is below top_p of the total.
        const u64 target = max(1ull, (u64)ceil(params.top_p * (double)total));
        const Selection nucleus = select(histogram, target, [&](int row, u32& key, u64& mass) {
            const float w = filter.weight(row);
            key = __float_as_uint(w), mass = fixed_point(fmaxf(w, 0.f));
            return w >= 0.f;
        });
        const u64 each = max(1ull, fixed_point(__uint_as_float(nucleus.threshold)));
        filter.least_bits = nucleus.threshold;
        filter.num_ties = (u32)((target - nucleus.above + each - 1) / each);
    }
    return inverse_cdf(filter, uniform(params.seed, step), sums, ties);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_pick(const float* scores, const Params* params, State* state, u32* seen, const int* vocab_map, int* host_tokens) {
    __shared__ u64 histogram[4096];
    __shared__ u64 sums[WARPS];
    __shared__ u32 ties[WARPS];
    let_next_start();
    wait_for_previous();
    const u64 best = (u64)load4((u32*)&state->best + 1) << 32 | load4(&state->best);
    const u64 step = (u64)load4((u32*)&state->step + 1) << 32 | load4(&state->step);
    const float peak = from_order_key((u32)(best >> 32));
    const bool has_nan = load4(&state->nan_seen), is_empty = peak == __uint_as_float(0xff800000u);
    int row = (int)~(u32)best;
    if (!has_nan && !is_empty && params->temperature != 0.f)
        row = draw_row(scores, *params, peak, step, histogram, sums, ties);
    __syncthreads();
    if (threadIdx.x != 0) return;
    int token = FAULT_NAN;
    if (!has_nan) token = is_empty ? FAULT_EMPTY : vocab_map ? vocab_map[row] : row;
    if (token >= 0 && params->penalty != 1.f) atomicOr(seen + row / 32, 1u << row % 32);
    state->token = token;
    state->position += 1;
    state->step = step + 1;
    state->best = 0;
    state->nan_seen = 0;
    host_tokens[step % RING] = token;
    __threadfence_system();
}

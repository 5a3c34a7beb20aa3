// Choosing the next token where the logits are; the steps and their order are those of engine_core/sampling.py.
//
// sample_scan, many CTAs: penalty, bias and mask give scores, and each run of rows its largest; the largest of all (first row
// on a tie) goes to state.best.
// sample_pick, one CTA: greedy takes it; else top-k, top-p and min-p, then the inverse CDF in row order of a Philox4x32-10
// draw (key: seed, counter: step). The runs' largest scores tell where the rows are that can matter; if these are few, a
// thread takes each of them (draw_of_few), else all rows are walked and the limits found by radix selection (draw_of_all).
// Weights are summed as 64-bit fixed point (2^44 = 1), so that no order of summation changes a token. The token goes to the
// state, for the next step, and to pinned host memory.
//
// scores: [ROWS], then the runs' largest [RUNS].
//
// BATCHED: the second dimension of sample_scan's grid and the first of sample_pick's is the sequence, and every array but vocab_map
// has one more dimension in front. slots: int32 [sequences], negative = nothing to do, or null. MASK_WORDS: words of a sequence's
// mask.
#include "common.cuh"

struct Params {
    double top_p;
    u64 seed;
    float temperature, min_p, penalty;
    int top_k;
    u32 has_bias, has_mask;
};

constexpr int WARPS = THREADS / 32;
constexpr float LOWEST = -3.4e38f;
constexpr int FAULT_NAN = -1, FAULT_EMPTY = -2;
constexpr u32 ALL_LANES = 0xffffffffu;
#ifndef BATCHED
#define BATCHED 0
#endif

constexpr int SEEN_WORDS = (ROWS + 31) / 32;  // of a sequence
constexpr int RUNS = THREADS, RUN = (ROWS + RUNS - 1) / RUNS;  // of rows that lie side by side

__device__ __forceinline__ u32 order_key(float v) {  // of any float but NaN, in the same order
    const u32 bits = __float_as_uint(v + 0.f);       // -0 becomes 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_order_key(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    sample_scan(const float* logits, const u32* seen, const float* bias, const u32* mask, const int* vocab_map,
                const Params* params, State* state, float* scores, const int* slots) {
    __shared__ u64 bests[SCAN_THREADS / 32];
    let_next_start();
    wait_for_previous();
#if BATCHED
    const u64 sequence = blockIdx.y;
    if (slots && (int)load4(slots + sequence) < 0) return;
    logits += sequence * ROWS, bias += sequence * ROWS, scores += sequence * (ROWS + RUNS);
    seen += sequence * SEEN_WORDS, mask += sequence * MASK_WORDS, params += sequence, state += sequence;
#endif
    const float penalty = params->penalty;
    const bool has_bias = params->has_bias, has_mask = params->has_mask;
    u64 best = 0;
    bool has_nan = false;
    const int lane = threadIdx.x % 32, num_warps = gridDim.x * (SCAN_THREADS / 32);
    for (int run = blockIdx.x * (SCAN_THREADS / 32) + threadIdx.x / 32; run < RUNS; run += num_warps) {
        float largest = LOWEST;
        const int end = min(ROWS, (run + 1) * RUN);
#pragma unroll 4
        for (int row = run * RUN + lane; row < end; row += 32) {
            float v = load4f(logits + row);
            if (penalty != 1.f && load4(seen + row / 32) >> row % 32 & 1) v = v < 0.f ? v * penalty : v / penalty;
            if (has_bias) v += load4f(bias + row);
            if (has_mask) {
                const int id = vocab_map ? vocab_map[row] : row;
                if (!(load4(mask + id / 32) >> id % 32 & 1)) v = __uint_as_float(0xff800000u);
            }
            scores[row] = v;
            has_nan |= v != v;
            largest = fmaxf(largest, v);
            const u64 candidate = (u64)order_key(v) << 32 | (u32)~row;
            best = candidate > best ? candidate : best;
        }
        for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
        if (lane == 0) scores[ROWS + run] = largest;
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

    __device__ __forceinline__ float weigh(float score) const { return expf((score - peak) / temperature); }

    __device__ __forceinline__ float weight(int row) const {  // negative: not among the top-k
        const float score = load4f(scores + row);
        return order_key(score) >= least_key ? weigh(score) : -1.f;
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

// The row at ``draw`` (in [0, 1)) of the cumulative weights, in row order. Each warp owns a share of the rows.
__device__ int inverse_cdf(const Filter& filter, double draw, u64* sums, u32* ties) {
    __shared__ int chosen;
    constexpr int SHARE = (ROWS + WARPS * 32 - 1) / (WARPS * 32) * 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * SHARE, last = min(ROWS, first + SHARE);
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

// The fixed-point mass of all rows' weights.
__device__ u64 total_mass(const Filter& filter, u64* sums) {
    u64 total = 0;
#pragma unroll 8
    for (int row = threadIdx.x; row < ROWS; row += THREADS) total += fixed_point(fmaxf(filter.weight(row), 0.f));
    return block_sum(total, sums);
}

// What top-p keeps of the rows in descending order: those before which there is less mass than this.
__device__ __forceinline__ u64 nucleus_mass(double top_p, u64 total) { return max(1ull, (u64)ceil(top_p * (double)total)); }

// total: the mass of all rows' weights, and least: what a row of the nucleus weighs at least; both without top-k only.
__device__ int draw_of_all(Filter filter, const Params& params, double draw, u64 total, float least, u64* histogram, u64* sums,
                           u32* ties) {
    const float* scores = filter.scores;
    if (params.top_k > 0 && params.top_k < ROWS)
        filter.least_key = select(histogram, params.top_k, [&](int row, u32& key, u64& mass) {
            key = order_key(load4f(scores + row)), mass = 1;
            return true;
        }).threshold;
    if (params.top_p < 1.0) {
        if (filter.least_key) total = total_mass(filter, sums);
        const u64 target = nucleus_mass(params.top_p, total);
        const Selection nucleus = select(histogram, target, [&](int row, u32& key, u64& mass) {
            const float w = filter.weight(row);
            key = __float_as_uint(w), mass = fixed_point(fmaxf(w, 0.f));
            return w >= least;
        });
        const u64 each = max(1ull, fixed_point(__uint_as_float(nucleus.threshold)));
        filter.least_bits = nucleus.threshold;
        filter.num_ties = (u32)((target - nucleus.above + each - 1) / each);
    }
    return inverse_cdf(filter, draw, sums, ties);
}

struct Few {  // the rows that can matter, in no order
    u32 keys[THREADS];
    int rows[THREADS];
    u64 masses[THREADS];
    int count;  // may be more than there is room for: then it is not complete
    int num_runs, runs[RUNS];
    int chosen;
};

// Fills ``few`` with the rows of at least the k-th largest key (k > 0) that weigh at least ``least``; false if they are many.
// There are k runs whose largest is at least the k-th largest of these, so as many rows are.
__device__ bool find_few(Few& few, const Filter& filter, int k, float least) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float largest = load4f(filter.scores + ROWS + threadIdx.x);
    const bool exists = threadIdx.x * RUN < ROWS;
    const u32 own = exists ? order_key(largest) : 0;
    u32 cut = 0;
    if (k > 0)
        for (u32 bit = 1u << 31; bit; bit /= 2)
            if (__syncthreads_count(own >= (cut | bit)) >= k) cut |= bit;
    if (threadIdx.x == 0) few.count = few.num_runs = 0;
    const bool wanted = exists && own >= cut && filter.weigh(largest) >= least;
    if (__syncthreads_count(wanted) > RUNS / 2 && RUN > 1) return false;  // not worth the try
    if (wanted) few.runs[atomicAdd(&few.num_runs, 1)] = threadIdx.x;
    __syncthreads();
    for (int i = warp; i < few.num_runs; i += WARPS) {
        const int first = few.runs[i] * RUN, end = min(ROWS, first + RUN);
#pragma unroll 4
        for (int base = first; base < end; base += 32) {
            const int row = base + lane;
            const float score = row < end ? load4f(filter.scores + row) : 0.f;
            const u32 key = order_key(score);
            const bool in = row < end && key >= cut && filter.weigh(score) >= least;
            const u32 lanes = __ballot_sync(ALL_LANES, in);
            if (!lanes) continue;
            int place = 0;
            if (lane == 0) place = atomicAdd(&few.count, __popc(lanes));
            place = __shfl_sync(ALL_LANES, place, 0) + __popc(lanes & ((1u << lane) - 1));
            if (in && place < THREADS) few.rows[place] = row, few.keys[place] = key;
        }
    }
    __syncthreads();
    const bool fits = few.count <= THREADS;
    __syncthreads();  // what does not fit makes room for a histogram
    return fits;
}

// As draw_of_all, with a thread for each row of ``few``. total: the mass of all rows' weights; with top-k it is not used.
__device__ int draw_of_few(Few& few, const Filter& filter, const Params& params, double draw, u64 total, u64* sums) {
    const int count = few.count, own = threadIdx.x;
    const int row = own < count ? few.rows[own] : 0;
    const u32 key = own < count ? few.keys[own] : 0;
    bool kept = own < count;
    if (params.top_k > 0) {
        int greater = 0;
#pragma unroll 4
        for (int i = 0; i < count; ++i) greater += few.keys[i] > key;
        kept &= greater < params.top_k;
    }
    const float weight = kept ? filter.weigh(from_order_key(key)) : 0.f;
    const u32 bits = __float_as_uint(weight);
    u64 mass = fixed_point(weight);
    __syncthreads();
    few.keys[own] = bits, few.masses[own] = mass;
    if (params.top_p < 1.0) {
        if (params.top_k > 0) total = block_sum(mass, sums);
        const u64 target = nucleus_mass(params.top_p, total);
        __syncthreads();
        u64 before = 0;  // of larger weights, and of the same in earlier rows
#pragma unroll 4
        for (int i = 0; i < count; ++i)
            if (few.keys[i] > bits) before += few.masses[i];
            else if (few.keys[i] == bits && few.rows[i] < row) before += max(1ull, mass);
        kept &= before < target;
    }
    kept &= weight >= filter.min_p;
    if (!kept) mass = 0;
    total = block_sum(mass, sums);
    few.masses[own] = mass;
    __syncthreads();
    u64 before = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) before += few.rows[i] < row ? few.masses[i] : 0;
    const u64 target = (u64)(draw * (double)total);  // the chosen row is the first whose cumulative mass exceeds it
    if (before <= target && target < before + mass) few.chosen = row;
    __syncthreads();
    return few.chosen;
}

__device__ int draw_row(const float* scores, const Params& params, float peak, u64 step, char* memory, u64* sums, u32* ties) {
    constexpr float LEAST = 5.6e-14f;  // below 2^-44: no mass
    const Filter filter = {scores, peak, params.temperature, params.min_p, 0u, 0u, ALL_LANES};
    const double draw = uniform(params.seed, step);
    const bool limits_k = params.top_k > 0 && params.top_k < ROWS, limits_p = params.top_p < 1.0;
    u64 total = 0;
    float least = fmaxf(LEAST, 0.999f * params.min_p);
    if (limits_p) {
        least = 0.f;  // every row of the top k counts
        if (!limits_k) {
            // Rows that weigh less have, all together, half of what top-p leaves out.
            total = total_mass(filter, sums);
            least = (float)((1.0 - params.top_p) * 0.5 / ROWS * ((double)total / 17592186044416.0));
        }
    }
    Few& few = *(Few*)memory;
    if ((!limits_k || params.top_k <= RUNS) && find_few(few, filter, limits_k ? params.top_k : 0, least))
        return draw_of_few(few, filter, params, draw, total, sums);
    return draw_of_all(filter, params, draw, total, least, (u64*)memory, sums, ties);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample_pick(const float* scores, const Params* params, State* state, u32* seen, const int* vocab_map, int* host_tokens,
                const int* slots) {
    __shared__ alignas(16) char memory[4096 * sizeof(u64)];  // a histogram, or Few
    static_assert(sizeof(Few) <= sizeof(memory), "no room");
    __shared__ u64 sums[WARPS];
    __shared__ u32 ties[WARPS];
    let_next_start();
    wait_for_previous();
#if BATCHED
    const u64 sequence = blockIdx.x;
    if (slots && (int)load4(slots + sequence) < 0) return;
    scores += sequence * (ROWS + RUNS), seen += sequence * SEEN_WORDS, params += sequence, state += sequence;
    host_tokens += sequence * RING;
#endif
    const u64 best = (u64)load4((u32*)&state->best + 1) << 32 | load4(&state->best);
    const u64 step = (u64)load4((u32*)&state->step + 1) << 32 | load4(&state->step);
    const float peak = from_order_key((u32)(best >> 32));
    const bool has_nan = load4(&state->nan_seen), is_empty = peak == __uint_as_float(0xff800000u);
    int row = (int)~(u32)best;
    if (!has_nan && !is_empty && params->temperature != 0.f)
        row = draw_row(scores, *params, peak, step, memory, sums, ties);
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

// A gated short convolution (LFM2): output = gate_2 * (Σ_k taps[k] * inputs[position - TAPS + 1 + k] + bias), inputs = gate_1 * x, each
// channel by itself. rows: 16-bit [n][3 COLS], which is gate_1, gate_2 and x; taps: 16-bit [TAPS][COLS], the oldest token's first; bias:
// 16-bit [COLS], with BIAS; output: 16-bit [n][COLS]. A thread has 8 channels.
//
// The inputs of earlier tokens are in a ring of this layer and KV slot, float32 [TAPS][COLS], that of position p in row p % TAPS: one row
// more than a token sees, so that a sequence may go back by one. SLOT_FLOATS: from a slot's ring to the next one's. Before position 0 there
// are zeros, whatever the ring holds. Sums are in one order, and the ring is not rounded: tokens alone and in chunks give the same bits.
#include "common.cuh"

struct Channels {
    float values[8];

    __device__ __forceinline__ void load_half(const half_t* p) { unpack8(load16(p), values); }
    __device__ __forceinline__ void load_float(const float* p) {
        const float4 a = load16f(p), b = load16f(p + 4);
        values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
        values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    }
    __device__ __forceinline__ void store(float* p) const {
        *(float4*)p = make_float4(values[0], values[1], values[2], values[3]);
        *(float4*)(p + 4) = make_float4(values[4], values[5], values[6], values[7]);
    }
    __device__ __forceinline__ void load_input(const half_t* row) {  // row: at this thread's channels of gate_1
        float x[8];
        unpack8(load16(row), values);
        unpack8(load16(row + 2 * COLS), x);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] *= x[j];
    }
    // The input of a token before those of this launch.
    __device__ __forceinline__ void load_earlier(const float* ring, int position) {
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = 0.f;
        if (position >= 0) load_float(ring + (position % TAPS) * COLS);
    }
};

struct Weights {
    Channels taps[TAPS], bias;

    __device__ __forceinline__ void load(const half_t* all_taps, const half_t* all_biases, int column) {
#pragma unroll
        for (int k = 0; k < TAPS; ++k) unpack8(*(const uint4*)(all_taps + k * COLS + column), taps[k].values);
        if (BIAS) unpack8(*(const uint4*)(all_biases + column), bias.values);
    }

    // window: the inputs that a token sees, the oldest first; row: as in load_input.
    __device__ __forceinline__ void convolve(const Channels (&window)[TAPS], const half_t* row, half_t* output) const {
        float sums[8], gate[8];
        unpack8(load16(row + COLS), gate);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sums[j] = window[0].values[j] * taps[0].values[j];
#pragma unroll
            for (int k = 1; k < TAPS; ++k) sums[j] = fmaf(window[k].values[j], taps[k].values[j], sums[j]);
            if (BIAS) sums[j] += bias.values[j];
            sums[j] *= gate[j];
        }
        *(uint4*)output = pack8(sums);
    }
};

// One token, or with BATCHED one of each of several sequences: state [n], slots [n] (negative = nothing to do). Grid: (CTAs for COLS, n).
extern "C" __global__ void __launch_bounds__(THREADS)
    short_conv_step(const half_t* rows, const half_t* taps, const half_t* bias, float* ring, const State* state, half_t* output,
                    const int* slots) {
    const int column = 8 * (blockIdx.x * THREADS + threadIdx.x);
    Weights weights;
    let_next_start();
    if (column < COLS) weights.load(taps, bias, column);
    wait_for_previous();
    const int position = (int)load4(&state[blockIdx.y].position), slot = BATCHED ? (int)load4(slots + blockIdx.y) : 0;
    if (column >= COLS || slot < 0 || position >= CONTEXT) return;
    const half_t* row = rows + (u64)blockIdx.y * 3 * COLS + column;
    Channels window[TAPS];
    if (TAPS > 1) ring += slot * (u64)SLOT_FLOATS + column;
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) window[k].load_earlier(ring, position - TAPS + 1 + k);
    window[TAPS - 1].load_input(row);
    weights.convolve(window, row, output + (u64)blockIdx.y * COLS + column);
    if (TAPS > 1) window[TAPS - 1].store(ring + (position % TAPS) * COLS);
}

// The tokens of a chunk, TILE of them to a thread. Grid: (CTAs for the tokens, CTAs for COLS). The threads of the first tokens alone read
// and write the ring.
extern "C" __global__ void __launch_bounds__(THREADS)
    short_conv_chunk(const half_t* rows, const half_t* taps, const half_t* bias, float* ring, const Chunk* chunk, half_t* output) {
    const int column = 8 * (blockIdx.y * THREADS + threadIdx.x), first = blockIdx.x * TILE;
    Weights weights;
    let_next_start();
    if (column < COLS) weights.load(taps, bias, column);
    const auto [position, count] = load_chunk(chunk);
    const int slot = SLOT_FLOATS ? (int)load4((const int*)chunk + 2) : 0;
    wait_for_previous();
    if (column >= COLS || first >= count) return;
    rows += column, output += column;
    if (TAPS > 1) ring += slot * (u64)SLOT_FLOATS + column;
    Channels window[TAPS];  // it moves on by one token at a time
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) {
        const int token = first - TAPS + 1 + k;
        if (token < 0)
            window[k + 1].load_earlier(ring, position + token);
        else
            window[k + 1].load_input(rows + (u64)token * 3 * COLS);
    }
    const int end = min(count, first + TILE);
    for (int token = first; token < end; ++token) {
#pragma unroll
        for (int k = 0; k < TAPS - 1; ++k) window[k] = window[k + 1];
        const half_t* row = rows + (u64)token * 3 * COLS;
        window[TAPS - 1].load_input(row);
        weights.convolve(window, row, output + (u64)token * COLS);
    }
    if (TAPS == 1 || first > 0) return;
    for (int token = max(0, count - TAPS); token < count; ++token) {
        Channels input;
        input.load_input(rows + (u64)token * 3 * COLS);
        input.store(ring + ((position + token) % TAPS) * COLS);
    }
}

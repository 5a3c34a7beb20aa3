// What becomes of q · k before the softmax, and which keys a query sees.
#pragma once
#include "common.cuh"

#ifndef SOFTCAP
#define SOFTCAP 0.f  // that scores stay below in magnitude (Gemma 2); 0 = none
#endif

#ifndef WINDOW
#define WINDOW 0  // keys that a query sees, its own token's included; 0 = all
#endif

// Scores are to the base 2: of q · k times SCORE_SCALE or, where they are capped, of ``soft_capped``.
constexpr bool CAPPED = SOFTCAP > 0.f;
constexpr float SCORE_SCALE = CAPPED ? 1.f : SCALE_LOG2E;

// SOFTCAP * tanh(score / SOFTCAP), to the base 2, of the score q · k * scale: tanh(x) = 1 - 2 / (1 + exp(2 x)).
__device__ __forceinline__ float soft_capped(float product) {
    constexpr float RATE = CAPPED ? 2.f * SCALE_LOG2E / SOFTCAP : 0.f, PEAK = SOFTCAP * 1.44269504089f;
    return PEAK - __fdividef(2.f * PEAK, 1.f + exp2f(product * RATE));
}

// What the launchers of head_divergence take; see core/params.h.
#pragma once

#include "core/attention.h"

namespace mimkernels {

// out[h, g] = mean over queries of the sum over the keys that both heads see (S > -inf) of
// P^h (L^h - L^g), L = (S - lse) - lse_low.
struct HeadDivergenceParams {
  AttentionScores scores;
  const float* lse = nullptr;  // [B, H, Nq]
  float* out = nullptr;        // [B, H, H]
};

}  // namespace mimkernels

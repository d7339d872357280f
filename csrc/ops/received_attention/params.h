// What the launchers of received_attention take; see core/params.h.
#pragma once

#include "core/attention.h"

namespace mimkernels {

// out[j] = mean over queries of P_ij = exp((S_ij - lse_i) - lse_low_i).
struct ReceivedAttentionParams {
  AttentionScores scores;
  const float* lse = nullptr;  // [B, H, Nq]
  float* out = nullptr;        // [B, H, Nk]
};

}  // namespace mimkernels

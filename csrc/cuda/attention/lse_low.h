// What rounding took from lse, which received_attention and head_divergence recompute.
#pragma once

#include <cuda_runtime.h>

#include "core/attention.h"

namespace mimkernels::cuda {

// low [B, H, Nq] = log of the sum over keys of exp(S - lse), 0 where lse is not large; on `stream`,
// asynchronously.
cudaError_t lse_low(const AttentionScores& s, const float* lse, float* low, cudaStream_t stream);

}  // namespace mimkernels::cuda

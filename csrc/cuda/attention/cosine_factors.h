// Cosine attention: the factors that make scores of the products of q and k, which stay as they are.
#pragma once

#include <cuda_runtime.h>

#include "core/attention.h"

namespace mimkernels::cuda {

// Fills s.cosine.rows and s.cosine.columns, in a workspace of cosine_factors_workspace(s) floats, and
// makes the scale, which the rows have, 1; on `stream`, asynchronously. Nothing where these scores
// are no cosines.
cudaError_t cosine_factors(AttentionScores& s, float* workspace, cudaStream_t stream);

inline int64_t cosine_factors_workspace(const AttentionScores& s) {
  return s.cosine.given ? s.batch * s.heads * (s.queries + s.keys) : 0;
}

}  // namespace mimkernels::cuda

// Launchers of attention on CUDA. Torch-free: the binding has checked the tensors and chosen the
// stream. All run asynchronously on `stream`, and give the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include "ops/attention/params.h"

namespace mimkernels::cuda {

cudaError_t attention_fwd(const AttentionFwdParams& params, cudaStream_t stream);

cudaError_t attention_coef(const AttentionCoefParams& params, cudaStream_t stream);

// `delta` holds attention_bwd_workspace(params) floats.
cudaError_t attention_bwd(const AttentionBwdParams& params, float* delta, cudaStream_t stream);

// Floats of workspace that attention_bwd needs: one for every query of every head.
inline int64_t attention_bwd_workspace(const AttentionBwdParams& params) {
  return params.scores.batch * params.scores.heads * params.scores.queries;
}

}  // namespace mimkernels::cuda

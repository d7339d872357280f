// Launchers of attention on CUDA. Torch-free: the binding has checked the tensors and chosen the
// stream. All run asynchronously on `stream`, and give the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention/cosine_factors.h"
#include "ops/attention/params.h"

namespace mimkernels::cuda {

// `workspace` holds attention_fwd_workspace(params) floats.
cudaError_t attention_fwd(const AttentionFwdParams& params, float* workspace, cudaStream_t stream);

inline int64_t attention_fwd_workspace(const AttentionFwdParams& params) {
  return cosine_factors_workspace(params.scores);
}

cudaError_t attention_coef(const AttentionCoefParams& params, cudaStream_t stream);

// `workspace` holds attention_bwd_workspace(params) floats.
cudaError_t attention_bwd(const AttentionBwdParams& params, float* workspace, cudaStream_t stream);

int64_t attention_bwd_workspace(const AttentionBwdParams& params);

}  // namespace mimkernels::cuda

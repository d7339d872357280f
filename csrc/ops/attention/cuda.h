// Launchers of attention and of its companions on CUDA. Torch-free: the binding has checked the
// tensors and chosen the stream. All run asynchronously on `stream`, and give the same bits on
// every run.
#pragma once

#include <cuda_runtime.h>

#include "core/attention.h"

namespace mimkernels::cuda {

cudaError_t attention_fwd(const AttentionFwdParams& params, cudaStream_t stream);

cudaError_t attention_coef(const AttentionCoefParams& params, cudaStream_t stream);

// `delta` holds B * H * Nq floats of workspace.
cudaError_t attention_bwd(const AttentionBwdParams& params, float* delta, cudaStream_t stream);

// `low` holds B * H * Nq floats of workspace.
cudaError_t received_attention_fwd(const ReceivedAttentionParams& params, float* low,
                                   cudaStream_t stream);

cudaError_t head_divergence_fwd(const HeadDivergenceParams& params, float* low,
                                cudaStream_t stream);

}  // namespace mimkernels::cuda

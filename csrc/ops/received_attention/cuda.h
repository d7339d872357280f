// Launchers of received_attention on CUDA. Torch-free: the binding has checked the tensors and chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/received_attention/params.h"

namespace mimkernels::cuda {

// On `stream`, asynchronously. `low` holds received_attention_fwd_workspace(params) floats. The same bits on
// every run.
cudaError_t received_attention_fwd(const ReceivedAttentionParams& params, float* low,
                                   cudaStream_t stream);

// Floats of workspace that received_attention_fwd needs: one for every query of every head, and those of cosines.
int64_t received_attention_fwd_workspace(const ReceivedAttentionParams& params);

}  // namespace mimkernels::cuda

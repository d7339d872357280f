// Launchers of head_divergence on CUDA. Torch-free: the binding has checked the tensors and chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/head_divergence/params.h"

namespace mimkernels::cuda {

// On `stream`, asynchronously. `low` holds head_divergence_fwd_workspace(params) floats. The same bits on
// every run.
cudaError_t head_divergence_fwd(const HeadDivergenceParams& params, float* low,
                                cudaStream_t stream);

// Floats of workspace that head_divergence_fwd needs: one for every query of every head, and those of cosines.
int64_t head_divergence_fwd_workspace(const HeadDivergenceParams& params);

}  // namespace mimkernels::cuda

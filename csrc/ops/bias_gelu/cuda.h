// Launchers of bias_gelu on CUDA. Torch-free: the binding has checked the tensors and chosen the
// stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/bias_gelu/params.h"

namespace mimkernels::cuda {

// out = gelu(x + bias); on `stream`, asynchronously.
cudaError_t bias_gelu_fwd(const BiasGeluFwdParams& params, cudaStream_t stream);

// dx and dbias of the above, each where its pointer is not null. `workspace` holds
// bias_gelu_bwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t bias_gelu_bwd(const BiasGeluBwdParams& params, float* workspace, cudaStream_t stream);

// Floats of workspace that bias_gelu_bwd needs.
int64_t bias_gelu_bwd_workspace(const BiasGeluBwdParams& params);

}  // namespace mimkernels::cuda

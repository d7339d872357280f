// Launchers of add_layer_norm on CUDA. Torch-free: the binding has checked the tensors and chosen
// the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/add_layer_norm/params.h"

namespace mimkernels::cuda {

// residual = x + drop * scale * y, and its rows normalised; on `stream`, asynchronously.
cudaError_t add_layer_norm_fwd(const AddLayerNormFwdParams& params, cudaStream_t stream);

// The gradients of the above, each where its pointer is not null. `workspace` holds
// add_layer_norm_bwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t add_layer_norm_bwd(const AddLayerNormBwdParams& params, float* workspace,
                               cudaStream_t stream);

// Floats of workspace that add_layer_norm_bwd needs.
int64_t add_layer_norm_bwd_workspace(const AddLayerNormBwdParams& params);

}  // namespace mimkernels::cuda

// Launchers of reduce_pool on CUDA. Torch-free: the binding has checked the tensors and chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/reduce_pool/params.h"

namespace mimkernels::cuda {

// out, and index (kMax) or moment (kGem), on `stream`, asynchronously.
cudaError_t reduce_pool_fwd(const ReducePoolParams& params, cudaStream_t stream);

// dx and dp, each where its pointer is not null. `workspace` holds
// reduce_pool_bwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t reduce_pool_bwd(const ReducePoolParams& params, float* workspace, cudaStream_t stream);

// Floats of workspace that reduce_pool_bwd needs.
int64_t reduce_pool_bwd_workspace(const ReducePoolParams& params);

}  // namespace mimkernels::cuda

// Launchers of query_pool on CUDA. Torch-free: the binding has checked the tensors and chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "core/token_pool.h"

namespace mimkernels::cuda {

// out and weights of the params, on `stream`, asynchronously. `workspace` holds
// query_pool_fwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t query_pool_fwd(const TokenPoolFwdParams& params, float* workspace, cudaStream_t stream);

// Floats of workspace that query_pool_fwd needs.
int64_t query_pool_fwd_workspace(const TokenPoolFwdParams& params);

// The gradients whose pointers are not null. As above.
cudaError_t query_pool_bwd(const TokenPoolBwdParams& params, float* workspace, cudaStream_t stream);

// Floats of workspace that query_pool_bwd needs.
int64_t query_pool_bwd_workspace(const TokenPoolBwdParams& params);

}  // namespace mimkernels::cuda

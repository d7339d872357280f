// Both directions of query_pool and weighted_pool on CUDA.
#pragma once

#include <cuda_runtime.h>

#include "core/token_pool.h"

namespace mimkernels::cuda {

// out and weights of the params, on `stream`, asynchronously. `workspace` holds
// token_pool_fwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t token_pool_fwd(const TokenPoolFwdParams& params, float* workspace, cudaStream_t stream);

// Floats of workspace that token_pool_fwd needs.
int64_t token_pool_fwd_workspace(const TokenPoolFwdParams& params);

// dx, dqueries, dvalues and dscores, each where its pointer is not null. As above.
cudaError_t token_pool_bwd(const TokenPoolBwdParams& params, float* workspace, cudaStream_t stream);

// Floats of workspace that token_pool_bwd needs.
int64_t token_pool_bwd_workspace(const TokenPoolBwdParams& params);

}  // namespace mimkernels::cuda

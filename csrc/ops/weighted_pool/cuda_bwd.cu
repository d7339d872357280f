// weighted_pool, backward: token_pool where the scores are given.
#include "cuda/pooling/token_pool.h"
#include "ops/weighted_pool/cuda.h"

namespace mimkernels::cuda {

cudaError_t weighted_pool_bwd(const TokenPoolBwdParams& params, float* workspace,
                              cudaStream_t stream) {
  return token_pool_bwd(params, workspace, stream);
}

int64_t weighted_pool_bwd_workspace(const TokenPoolBwdParams& params) {
  return token_pool_bwd_workspace(params);
}

}  // namespace mimkernels::cuda

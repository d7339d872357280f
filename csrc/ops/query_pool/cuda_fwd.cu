// query_pool, forward: token_pool where the weights are the softmax of queries times tokens.
#include "cuda/pooling/token_pool.h"
#include "ops/query_pool/cuda.h"

namespace mimkernels::cuda {

cudaError_t query_pool_fwd(const TokenPoolFwdParams& params, float* workspace,
                           cudaStream_t stream) {
  return token_pool_fwd(params, workspace, stream);
}

int64_t query_pool_fwd_workspace(const TokenPoolFwdParams& params) {
  return token_pool_fwd_workspace(params);
}

}  // namespace mimkernels::cuda

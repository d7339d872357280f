// query_pool, backward: token_pool where the weights are the softmax of queries times tokens.
#include "cuda/pooling/token_pool.h"
#include "ops/query_pool/cuda.h"

namespace mimkernels::cuda {

cudaError_t query_pool_bwd(const TokenPoolBwdParams& params, float* workspace,
                           cudaStream_t stream) {
  return token_pool_bwd(params, workspace, stream);
}

int64_t query_pool_bwd_workspace(const TokenPoolBwdParams& params) {
  return token_pool_bwd_workspace(params);
}

}  // namespace mimkernels::cuda

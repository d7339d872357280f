// query_pool, forward: token_pool where the weights are the softmax of queries times tokens.
#include "cpu/kernels.h"
#include "cpu/pooling/token_pool.h"

namespace mimkernels::MIMKERNELS_ISA {

Status query_pool_fwd(const TokenPoolFwdParams& params, ParallelFor parallel_for) {
  return token_pool_fwd(params, parallel_for);
}

}  // namespace mimkernels::MIMKERNELS_ISA

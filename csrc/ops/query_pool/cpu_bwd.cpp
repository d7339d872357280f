// query_pool, backward: token_pool where the weights are the softmax of queries times tokens.
#include "cpu/kernels.h"
#include "cpu/pooling/token_pool.h"

namespace mimkernels::MIMKERNELS_ISA {

Status query_pool_bwd(const TokenPoolBwdParams& params, ParallelFor parallel_for) {
  return token_pool_bwd(params, parallel_for);
}

}  // namespace mimkernels::MIMKERNELS_ISA

// weighted_pool, forward: token_pool where the scores are given.
#include "cpu/kernels.h"
#include "cpu/pooling/token_pool.h"

namespace mimkernels::MIMKERNELS_ISA {

Status weighted_pool_fwd(const TokenPoolFwdParams& params, ParallelFor parallel_for) {
  return token_pool_fwd(params, parallel_for);
}

}  // namespace mimkernels::MIMKERNELS_ISA

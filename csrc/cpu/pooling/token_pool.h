// Both directions of query_pool and weighted_pool.
#pragma once

#include "core/parallel.h"
#include "core/status.h"
#include "core/token_pool.h"

namespace mimkernels::MIMKERNELS_ISA {

Status token_pool_fwd(const TokenPoolFwdParams& params, ParallelFor parallel_for);
Status token_pool_bwd(const TokenPoolBwdParams& params, ParallelFor parallel_for);

}  // namespace mimkernels::MIMKERNELS_ISA

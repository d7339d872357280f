#include "ops/query_pool/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(query_pool, fwd)
MIMKERNELS_BIND_CPU(query_pool, bwd)

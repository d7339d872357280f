#include "ops/reduce_pool/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(reduce_pool, fwd)
MIMKERNELS_BIND_CPU(reduce_pool, bwd)

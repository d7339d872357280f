#include "ops/weighted_pool/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(weighted_pool, fwd)
MIMKERNELS_BIND_CPU(weighted_pool, bwd)

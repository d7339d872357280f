#include "ops/upsample_cross_entropy/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(upsample_cross_entropy, fwd)
MIMKERNELS_BIND_CPU(upsample_cross_entropy, bwd)

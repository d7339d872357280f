#include "ops/bias_gelu/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(bias_gelu, fwd)
MIMKERNELS_BIND_CPU(bias_gelu, bwd)

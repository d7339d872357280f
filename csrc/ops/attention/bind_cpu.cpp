#include "ops/attention/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(attention, fwd)
MIMKERNELS_BIND_CPU(attention, coef)
MIMKERNELS_BIND_CPU(attention, bwd)

#include "ops/head_divergence/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(head_divergence, fwd)

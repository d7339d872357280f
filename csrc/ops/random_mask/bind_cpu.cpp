#include "ops/random_mask/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(random_mask, fwd)

#include "ops/mask_from_noise/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(mask_from_noise, fwd)

#include "ops/masked_patch_loss/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(masked_patch_loss, fwd)
MIMKERNELS_BIND_CPU(masked_patch_loss, bwd)

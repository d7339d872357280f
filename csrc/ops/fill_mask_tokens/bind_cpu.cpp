#include "ops/fill_mask_tokens/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(fill_mask_tokens, fwd)
MIMKERNELS_BIND_CPU(fill_mask_tokens, bwd)

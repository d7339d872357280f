#include "ops/gather_tokens/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(gather_tokens, fwd)
MIMKERNELS_BIND_CPU(gather_tokens, bwd)

#include "ops/restore_tokens/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(restore_tokens, fwd)
MIMKERNELS_BIND_CPU(restore_tokens, bwd)

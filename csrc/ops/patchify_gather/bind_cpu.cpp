#include "ops/patchify_gather/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(patchify_gather, fwd)
MIMKERNELS_BIND_CPU(patchify_gather, bwd)

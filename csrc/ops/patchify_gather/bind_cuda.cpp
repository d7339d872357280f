#include "ops/patchify_gather/bind.h"
#include "ops/patchify_gather/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(patchify_gather, fwd)
MIMKERNELS_BIND_CUDA(patchify_gather, bwd)

#include "ops/gather_tokens/bind.h"
#include "ops/gather_tokens/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(gather_tokens, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(gather_tokens, bwd)

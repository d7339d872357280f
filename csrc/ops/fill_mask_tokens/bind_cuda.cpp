#include "ops/fill_mask_tokens/bind.h"
#include "ops/fill_mask_tokens/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(fill_mask_tokens, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(fill_mask_tokens, bwd)

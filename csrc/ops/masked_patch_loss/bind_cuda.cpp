#include "ops/masked_patch_loss/bind.h"
#include "ops/masked_patch_loss/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(masked_patch_loss, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(masked_patch_loss, bwd)

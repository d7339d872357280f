#include "ops/random_mask/bind.h"
#include "ops/random_mask/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(random_mask, fwd)

#include "ops/mask_from_noise/bind.h"
#include "ops/mask_from_noise/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(mask_from_noise, fwd)

#include "ops/upsample_cross_entropy/bind.h"
#include "ops/upsample_cross_entropy/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(upsample_cross_entropy, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(upsample_cross_entropy, bwd)

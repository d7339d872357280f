#include "ops/weighted_pool/bind.h"
#include "ops/weighted_pool/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(weighted_pool, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(weighted_pool, bwd)

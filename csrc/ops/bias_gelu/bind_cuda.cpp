#include "ops/bias_gelu/bind.h"
#include "ops/bias_gelu/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(bias_gelu, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(bias_gelu, bwd)

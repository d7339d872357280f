#include "ops/attention/bind.h"
#include "ops/attention/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(attention, fwd)
MIMKERNELS_BIND_CUDA(attention, coef)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(attention, bwd)

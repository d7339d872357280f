#include "ops/head_divergence/bind.h"
#include "ops/head_divergence/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(head_divergence, fwd)

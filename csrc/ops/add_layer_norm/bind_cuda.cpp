#include "ops/add_layer_norm/bind.h"
#include "ops/add_layer_norm/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(add_layer_norm, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(add_layer_norm, bwd)

#include "ops/masked_feature_loss/bind.h"
#include "ops/masked_feature_loss/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(masked_feature_loss, fwd)
MIMKERNELS_BIND_CUDA(masked_feature_loss, bwd)

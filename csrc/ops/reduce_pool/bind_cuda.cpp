#include "ops/reduce_pool/bind.h"
#include "ops/reduce_pool/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(reduce_pool, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(reduce_pool, bwd)

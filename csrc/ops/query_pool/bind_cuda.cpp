#include "ops/query_pool/bind.h"
#include "ops/query_pool/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(query_pool, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(query_pool, bwd)

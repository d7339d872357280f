#include "ops/received_attention/bind.h"
#include "ops/received_attention/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(received_attention, fwd)

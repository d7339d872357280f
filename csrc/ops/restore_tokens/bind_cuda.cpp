#include "ops/restore_tokens/bind.h"
#include "ops/restore_tokens/cuda.h"
#include "torch/cuda_common.h"

MIMKERNELS_BIND_CUDA(restore_tokens, fwd)
MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(restore_tokens, bwd)

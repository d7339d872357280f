// Binds the CUDA kernels to torch. Python defines the schemas; here are only the implementations,
// so that one library serves every torch from 2.10 on. Op by op in cuda_*.h.
#include "cuda_attention.h"
#include "cuda_common.h"
#include "cuda_tokens.h"

MIMKERNELS_CUDA_LIBRARY(m) {
  MIMKERNELS_CUDA_IMPL(m, gather_tokens_fwd);
  MIMKERNELS_CUDA_IMPL(m, gather_tokens_bwd);
  MIMKERNELS_CUDA_IMPL(m, attention_fwd);
  MIMKERNELS_CUDA_IMPL(m, attention_bwd);
  MIMKERNELS_CUDA_IMPL(m, received_attention_fwd);
  MIMKERNELS_CUDA_IMPL(m, head_divergence_fwd);
}

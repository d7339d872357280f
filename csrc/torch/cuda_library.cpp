// Binds the CUDA kernels to torch. Python defines the schemas; here are only the implementations,
// so that one library serves every torch from 2.10 on. Op by op in cuda_*.h.
#include "torch/cuda_attention.h"
#include "torch/cuda_common.h"
#include "torch/cuda_gelu.h"
#include "torch/cuda_loss.h"
#include "torch/cuda_masks.h"
#include "torch/cuda_patches.h"
#include "torch/cuda_pool.h"
#include "torch/cuda_tokens.h"

MIMKERNELS_CUDA_LIBRARY(m) {
  MIMKERNELS_CUDA_IMPL(m, gather_tokens_fwd);
  MIMKERNELS_CUDA_IMPL(m, gather_tokens_bwd);
  MIMKERNELS_CUDA_IMPL(m, restore_tokens_fwd);
  MIMKERNELS_CUDA_IMPL(m, restore_tokens_bwd);
  MIMKERNELS_CUDA_IMPL(m, fill_mask_tokens_fwd);
  MIMKERNELS_CUDA_IMPL(m, fill_mask_tokens_bwd);
  MIMKERNELS_CUDA_IMPL(m, patchify_gather_fwd);
  MIMKERNELS_CUDA_IMPL(m, patchify_gather_bwd);
  MIMKERNELS_CUDA_IMPL(m, masked_patch_loss_fwd);
  MIMKERNELS_CUDA_IMPL(m, masked_patch_loss_bwd);
  MIMKERNELS_CUDA_IMPL(m, mask_from_noise_fwd);
  MIMKERNELS_CUDA_IMPL(m, bias_gelu_fwd);
  MIMKERNELS_CUDA_IMPL(m, bias_gelu_bwd);
  MIMKERNELS_CUDA_IMPL(m, attention_fwd);
  MIMKERNELS_CUDA_IMPL(m, attention_coef);
  MIMKERNELS_CUDA_IMPL(m, attention_bwd);
  MIMKERNELS_CUDA_IMPL(m, received_attention_fwd);
  MIMKERNELS_CUDA_IMPL(m, head_divergence_fwd);
  MIMKERNELS_CUDA_IMPL(m, query_pool_fwd);
  MIMKERNELS_CUDA_IMPL(m, query_pool_bwd);
  MIMKERNELS_CUDA_IMPL(m, weighted_pool_fwd);
  MIMKERNELS_CUDA_IMPL(m, weighted_pool_bwd);
  MIMKERNELS_CUDA_IMPL(m, reduce_pool_fwd);
  MIMKERNELS_CUDA_IMPL(m, reduce_pool_bwd);
}

// Has no tensor to be dispatched by.
STABLE_TORCH_LIBRARY_IMPL(mimkernels, CompositeExplicitAutograd, m) {
  MIMKERNELS_CUDA_IMPL(m, random_mask_fwd);
}

// Binds the CPU kernels to torch. Python defines the schemas; here are only the implementations, so
// that one library serves every torch from 2.10 on. Op by op in cpu_*.h.
#include <string>

#include "cpu/dispatch.h"
#include "torch/cpu_attention.h"
#include "torch/cpu_gelu.h"
#include "torch/cpu_loss.h"
#include "torch/cpu_masks.h"
#include "torch/cpu_patches.h"
#include "torch/cpu_pool.h"
#include "torch/cpu_tokens.h"

namespace {

std::string cpu_isa() { return mimkernels::cpu_kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimkernels, m) {
  // The name of the instruction set whose kernels this process runs.
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mimkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("random_mask_fwd.cpu", TORCH_BOX(&mimkernels::binding::random_mask_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(mimkernels, CPU, m) {
  namespace binding = mimkernels::binding;
  m.impl("mask_from_noise_fwd.cpu", TORCH_BOX(&binding::mask_from_noise_fwd));
  m.impl("gather_tokens_fwd.cpu", TORCH_BOX(&binding::gather_tokens_fwd));
  m.impl("gather_tokens_bwd.cpu", TORCH_BOX(&binding::gather_tokens_bwd));
  m.impl("patchify_gather_fwd.cpu", TORCH_BOX(&binding::patchify_gather_fwd));
  m.impl("patchify_gather_bwd.cpu", TORCH_BOX(&binding::patchify_gather_bwd));
  m.impl("restore_tokens_fwd.cpu", TORCH_BOX(&binding::restore_tokens_fwd));
  m.impl("restore_tokens_bwd.cpu", TORCH_BOX(&binding::restore_tokens_bwd));
  m.impl("fill_mask_tokens_fwd.cpu", TORCH_BOX(&binding::fill_mask_tokens_fwd));
  m.impl("fill_mask_tokens_bwd.cpu", TORCH_BOX(&binding::fill_mask_tokens_bwd));
  m.impl("masked_patch_loss_fwd.cpu", TORCH_BOX(&binding::masked_patch_loss_fwd));
  m.impl("masked_patch_loss_bwd.cpu", TORCH_BOX(&binding::masked_patch_loss_bwd));
  m.impl("bias_gelu_fwd.cpu", TORCH_BOX(&binding::bias_gelu_fwd));
  m.impl("bias_gelu_bwd.cpu", TORCH_BOX(&binding::bias_gelu_bwd));
  m.impl("attention_fwd.cpu", TORCH_BOX(&binding::attention_fwd));
  m.impl("attention_coef.cpu", TORCH_BOX(&binding::attention_coef));
  m.impl("attention_bwd.cpu", TORCH_BOX(&binding::attention_bwd));
  m.impl("received_attention_fwd.cpu", TORCH_BOX(&binding::received_attention_fwd));
  m.impl("head_divergence_fwd.cpu", TORCH_BOX(&binding::head_divergence_fwd));
  m.impl("query_pool_fwd.cpu", TORCH_BOX(&binding::query_pool_fwd));
  m.impl("query_pool_bwd.cpu", TORCH_BOX(&binding::query_pool_bwd));
  m.impl("weighted_pool_fwd.cpu", TORCH_BOX(&binding::weighted_pool_fwd));
  m.impl("weighted_pool_bwd.cpu", TORCH_BOX(&binding::weighted_pool_bwd));
  m.impl("reduce_pool_fwd.cpu", TORCH_BOX(&binding::reduce_pool_fwd));
  m.impl("reduce_pool_bwd.cpu", TORCH_BOX(&binding::reduce_pool_bwd));
}

// The kernels of one instruction set as a table for dispatch.cpp.
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

#define MIMKERNELS_STRING_OF(name) #name
#define MIMKERNELS_STRING(name) MIMKERNELS_STRING_OF(name)

namespace mimkernels::MIMKERNELS_ISA {

extern const CpuKernels kernel_table;
const CpuKernels kernel_table = {
    MIMKERNELS_STRING(MIMKERNELS_ISA),
    &random_mask_fwd,
    &mask_from_noise_fwd,
    &gather_tokens_fwd,
    &gather_tokens_bwd,
    &patchify_gather_fwd,
    &patchify_gather_bwd,
    &restore_tokens_fwd,
    &restore_tokens_bwd,
    &fill_mask_tokens_fwd,
    &fill_mask_tokens_bwd,
    &masked_patch_loss_fwd,
    &masked_patch_loss_bwd,
    &bias_gelu_fwd,
    &bias_gelu_bwd,
    &attention_fwd,
    &attention_coef,
    &attention_bwd,
    &received_attention_fwd,
    &head_divergence_fwd,
    &token_pool_fwd,
    &token_pool_bwd,
    &reduce_pool_fwd,
    &reduce_pool_bwd,
};

}  // namespace mimkernels::MIMKERNELS_ISA

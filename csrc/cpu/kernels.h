// The launchers of one instruction set; defined in the op files, collected by table.cpp.
#pragma once

#include "core/attention.h"
#include "core/parallel.h"
#include "core/params.h"
#include "core/status.h"
#include "core/token_pool.h"
#include "ops/bias_gelu/params.h"

namespace mimkernels::MIMKERNELS_ISA {

Status random_mask_fwd(const RandomMaskParams& params, ParallelFor parallel_for);
Status mask_from_noise_fwd(const MaskFromNoiseParams& params, ParallelFor parallel_for);
Status gather_tokens_fwd(const GatherTokensFwdParams& params, ParallelFor parallel_for);
Status gather_tokens_bwd(const GatherTokensBwdParams& params, ParallelFor parallel_for);
Status patchify_gather_fwd(const PatchifyGatherFwdParams& params, ParallelFor parallel_for);
Status patchify_gather_bwd(const PatchifyGatherBwdParams& params, ParallelFor parallel_for);
Status restore_tokens_fwd(const RestoreTokensFwdParams& params, ParallelFor parallel_for);
Status restore_tokens_bwd(const RestoreTokensBwdParams& params, ParallelFor parallel_for);
Status fill_mask_tokens_fwd(const FillMaskTokensFwdParams& params, ParallelFor parallel_for);
Status fill_mask_tokens_bwd(const FillMaskTokensBwdParams& params, ParallelFor parallel_for);
Status masked_patch_loss_fwd(const MaskedPatchLossParams& params, ParallelFor parallel_for);
Status masked_patch_loss_bwd(const MaskedPatchLossParams& params, ParallelFor parallel_for);
Status bias_gelu_fwd(const BiasGeluFwdParams& params, ParallelFor parallel_for);
Status bias_gelu_bwd(const BiasGeluBwdParams& params, ParallelFor parallel_for);
Status attention_fwd(const AttentionFwdParams& params, ParallelFor parallel_for);
Status attention_coef(const AttentionCoefParams& params, ParallelFor parallel_for);
Status attention_bwd(const AttentionBwdParams& params, ParallelFor parallel_for);
Status received_attention_fwd(const ReceivedAttentionParams& params, ParallelFor parallel_for);
Status head_divergence_fwd(const HeadDivergenceParams& params, ParallelFor parallel_for);
Status token_pool_fwd(const TokenPoolFwdParams& params, ParallelFor parallel_for);
Status token_pool_bwd(const TokenPoolBwdParams& params, ParallelFor parallel_for);
Status reduce_pool_fwd(const ReducePoolParams& params, ParallelFor parallel_for);
Status reduce_pool_bwd(const ReducePoolParams& params, ParallelFor parallel_for);

}  // namespace mimkernels::MIMKERNELS_ISA

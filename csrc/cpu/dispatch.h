// One set of CPU kernels per instruction set, chosen once per process.
#pragma once

#include "core/attention.h"
#include "core/parallel.h"
#include "core/params.h"
#include "core/status.h"
#include "core/token_pool.h"
#include "ops/bias_gelu/params.h"

namespace mimkernels {

struct CpuKernels {
  const char* isa;
  Status (*random_mask_fwd)(const RandomMaskParams&, ParallelFor);
  Status (*mask_from_noise_fwd)(const MaskFromNoiseParams&, ParallelFor);
  Status (*gather_tokens_fwd)(const GatherTokensFwdParams&, ParallelFor);
  Status (*gather_tokens_bwd)(const GatherTokensBwdParams&, ParallelFor);
  Status (*patchify_gather_fwd)(const PatchifyGatherFwdParams&, ParallelFor);
  Status (*patchify_gather_bwd)(const PatchifyGatherBwdParams&, ParallelFor);
  Status (*restore_tokens_fwd)(const RestoreTokensFwdParams&, ParallelFor);
  Status (*restore_tokens_bwd)(const RestoreTokensBwdParams&, ParallelFor);
  Status (*fill_mask_tokens_fwd)(const FillMaskTokensFwdParams&, ParallelFor);
  Status (*fill_mask_tokens_bwd)(const FillMaskTokensBwdParams&, ParallelFor);
  Status (*masked_patch_loss_fwd)(const MaskedPatchLossParams&, ParallelFor);
  Status (*masked_patch_loss_bwd)(const MaskedPatchLossParams&, ParallelFor);
  Status (*bias_gelu_fwd)(const BiasGeluFwdParams&, ParallelFor);
  Status (*bias_gelu_bwd)(const BiasGeluBwdParams&, ParallelFor);
  Status (*attention_fwd)(const AttentionFwdParams&, ParallelFor);
  Status (*attention_coef)(const AttentionCoefParams&, ParallelFor);
  Status (*attention_bwd)(const AttentionBwdParams&, ParallelFor);
  Status (*received_attention_fwd)(const ReceivedAttentionParams&, ParallelFor);
  Status (*head_divergence_fwd)(const HeadDivergenceParams&, ParallelFor);
  Status (*token_pool_fwd)(const TokenPoolFwdParams&, ParallelFor);
  Status (*token_pool_bwd)(const TokenPoolBwdParams&, ParallelFor);
  Status (*reduce_pool_fwd)(const ReducePoolParams&, ParallelFor);
  Status (*reduce_pool_bwd)(const ReducePoolParams&, ParallelFor);
};

// The best set this CPU runs, or the one MIMKERNELS_CPU_ISA names. Throws std::invalid_argument
// when that name is unknown, not built, or more than the CPU has.
const CpuKernels& cpu_kernels();

}  // namespace mimkernels

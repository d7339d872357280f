// Bindings of masked_patch_loss on CUDA.
#pragma once

#include "ops/masked_patch_loss/cuda.h"
#include "torch/cuda_common.h"
#include "torch/loss_args.h"

namespace mimkernels::binding {

inline Tensor masked_patch_loss_fwd(const Tensor& pred, const Tensor& images, OptionalTensor ids,
                                    OptionalTensor mask, int64_t patch_t, int64_t patch_h,
                                    int64_t patch_w, OptionalTensor scale, OptionalTensor shift,
                                    bool norm_pix, int64_t kind, double beta, bool channels_last,
                                    bool mean) {
  MaskedPatchLossParams params;
  const LossInputs inputs =
      set_loss_inputs(params, SameDevice{pred}, pred, images, ids, mask, patch_t, patch_h, patch_w,
                      scale, shift, norm_pix, kind, beta, channels_last, mean);
  check_ids("masked_patch_loss", "ids", inputs.ids, patch_count(params.grid));
  Tensor loss = mean ? new_output_like(pred, {}, ScalarType::Float)
                     : new_output_like(pred, {params.grid.batch, params.length}, ScalarType::Float);
  params.loss = static_cast<float*>(loss.data_ptr());
  const Tensor workspace =
      new_workspace(pred, cuda::masked_patch_loss_fwd_workspace(params), ScalarType::Double);
  const OnDevice device(pred);
  check_cuda(cuda::masked_patch_loss_fwd(params, static_cast<double*>(workspace.data_ptr()),
                                         current_stream(pred)));
  return loss;
}

inline Tensor masked_patch_loss_bwd(const Tensor& grad, const Tensor& pred, const Tensor& images,
                                    OptionalTensor ids, OptionalTensor mask, int64_t patch_t,
                                    int64_t patch_h, int64_t patch_w, OptionalTensor scale,
                                    OptionalTensor shift, bool norm_pix, int64_t kind, double beta,
                                    bool channels_last, bool mean) {
  MaskedPatchLossParams params;
  const LossInputs inputs =
      set_loss_inputs(params, SameDevice{pred}, pred, images, ids, mask, patch_t, patch_h, patch_w,
                      scale, shift, norm_pix, kind, beta, channels_last, mean);
  set_loss_grad(params, SameDevice{pred}, grad);
  check_ids("masked_patch_loss", "ids", inputs.ids, patch_count(params.grid));
  Tensor dpred =
      new_output_like(pred, {params.grid.batch, params.length, pred.size(2)}, pred.scalar_type());
  params.dpred = dpred.data_ptr();
  const Tensor workspace =
      new_workspace(pred, cuda::masked_patch_loss_bwd_workspace(params), ScalarType::Long);
  const OnDevice device(pred);
  check_cuda(cuda::masked_patch_loss_bwd(params, static_cast<int64_t*>(workspace.data_ptr()),
                                         current_stream(pred)));
  return dpred;
}

}  // namespace mimkernels::binding

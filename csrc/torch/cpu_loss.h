// Bindings of masked_patch_loss.
#pragma once

#include "cpu/dispatch.h"
#include "torch/loss_args.h"

namespace mimkernels::binding {

inline Tensor masked_patch_loss_fwd(const Tensor& pred, const Tensor& images, OptionalTensor ids,
                                    OptionalTensor mask, int64_t patch_t, int64_t patch_h,
                                    int64_t patch_w, OptionalTensor scale, OptionalTensor shift,
                                    bool norm_pix, int64_t kind, double beta, bool channels_last,
                                    bool mean) {
  MaskedPatchLossParams params;
  const LossInputs inputs =
      set_loss_inputs(params, check_shape, pred, images, ids, mask, patch_t, patch_h, patch_w,
                      scale, shift, norm_pix, kind, beta, channels_last, mean);
  Tensor loss = mean ? new_output({}, ScalarType::Float)
                     : new_output({params.grid.batch, params.length}, ScalarType::Float);
  params.loss = static_cast<float*>(loss.data_ptr());
  raise_if_failed(cpu_kernels().masked_patch_loss_fwd(params, &torch_pool), "masked_patch_loss",
                  "ids", false);
  return loss;
}

inline Tensor masked_patch_loss_bwd(const Tensor& grad, const Tensor& pred, const Tensor& images,
                                    OptionalTensor ids, OptionalTensor mask, int64_t patch_t,
                                    int64_t patch_h, int64_t patch_w, OptionalTensor scale,
                                    OptionalTensor shift, bool norm_pix, int64_t kind, double beta,
                                    bool channels_last, bool mean) {
  MaskedPatchLossParams params;
  const LossInputs inputs =
      set_loss_inputs(params, check_shape, pred, images, ids, mask, patch_t, patch_h, patch_w,
                      scale, shift, norm_pix, kind, beta, channels_last, mean);
  set_loss_grad(params, check_shape, grad);
  Tensor dpred = new_output({params.grid.batch, params.length, pred.size(2)}, pred.scalar_type());
  params.dpred = dpred.data_ptr();
  raise_if_failed(cpu_kernels().masked_patch_loss_bwd(params, &torch_pool), "masked_patch_loss",
                  "ids", false);
  return dpred;
}

}  // namespace mimkernels::binding

// Arguments of masked_patch_loss as parameters of its kernels, on the CPU and on CUDA; `check` as
// in patch_args.h.
#pragma once

#include "torch/patch_args.h"

namespace mimkernels::binding {

// The tensors whose memory a loss call reads, alive until it returns.
struct LossInputs {
  Tensor pred;
  Tensor images;
  OptionalTensor ids;
  OptionalTensor mask;
  ChannelConstants constants;
};

template <typename Check>
LossInputs set_loss_inputs(MaskedPatchLossParams& params, const Check& check, const Tensor& pred,
                           const Tensor& images, const OptionalTensor& ids,
                           const OptionalTensor& mask, int64_t patch_t, int64_t patch_h,
                           int64_t patch_w, const OptionalTensor& scale,
                           const OptionalTensor& shift, bool norm_pix, int64_t kind, double beta,
                           bool channels_last, bool mean) {
  params.grid = grid_of(check, images, patch_t, patch_h, patch_w);
  check_argument(ids.has_value() != mask.has_value(), "give exactly one of ids and mask");
  check_argument(kind >= 0 && kind <= 2,
                 "kind is " + std::to_string(kind) + ", expected 0, 1 or 2");
  check(pred, "pred", {params.grid.batch, kAny, patch_elements(params.grid)});
  params.dtype = dtype_of(pred.scalar_type(), "pred", false);
  params.length = pred.size(1);
  if (mask.has_value()) {
    check(*mask, "mask", {params.grid.batch, patch_count(params.grid)});
    check_dtype(*mask, "mask", ScalarType::Bool);
    check_argument(params.length == patch_count(params.grid),
                   "pred has " + std::to_string(params.length) + " patches per image, mask has " +
                       std::to_string(patch_count(params.grid)));
  } else {
    check(*ids, "ids", {params.grid.batch, params.length});
    check_dtype(*ids, "ids", ScalarType::Long);
  }
  LossInputs inputs = {rows_of(pred), rows_of(images), rows_of(ids), rows_of(mask),
                       channel_constants(check, scale, shift, params.grid.channels)};
  params.pred = view_rows(inputs.pred);
  params.images = view_images(inputs.images, inputs.constants);
  if (inputs.ids.has_value()) params.ids = view_ids(*inputs.ids);
  if (inputs.mask.has_value()) params.mask = view_mask(*inputs.mask);
  params.norm_pix = norm_pix;
  params.kind = static_cast<LossKind>(kind);
  params.beta = static_cast<float>(beta);
  params.channels_last = channels_last;
  params.mean = mean;
  return inputs;
}

// The upstream gradient: one number for the mean, else one per patch, by stride.
template <typename Check>
void set_loss_grad(MaskedPatchLossParams& params, const Check& check, const Tensor& grad) {
  check_dtype(grad, "grad", ScalarType::Float);
  if (params.mean) {
    check(grad, "grad", {});
  } else {
    check(grad, "grad", {params.grid.batch, params.length});
    params.grad_strides[0] = grad.stride(0);
    params.grad_strides[1] = grad.stride(1);
  }
  params.grad = static_cast<const float*>(grad.data_ptr());
}

}  // namespace mimkernels::binding

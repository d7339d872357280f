// Bindings of masked_patch_loss.
#pragma once

#include "../cpu/dispatch.h"
#include "cpu_patches.h"
#include "cpu_tokens.h"
#include "tensor_args.h"

namespace mimkernels::binding {

// The tensors whose memory a loss call reads, alive until it returns.
struct LossInputs {
  Tensor pred;
  Tensor images;
  OptionalTensor ids;
  OptionalTensor mask;
  ChannelConstants constants;
};

inline LossInputs set_loss_inputs(MaskedPatchLossParams& params, const Tensor& pred,
                                  const Tensor& images, const OptionalTensor& ids,
                                  const OptionalTensor& mask, int64_t patch_t, int64_t patch_h,
                                  int64_t patch_w, const OptionalTensor& scale,
                                  const OptionalTensor& shift, bool norm_pix, int64_t kind,
                                  double beta, bool channels_last, bool mean) {
  params.grid = grid_of(images, patch_t, patch_h, patch_w);
  check_argument(ids.has_value() != mask.has_value(), "give exactly one of ids and mask");
  check_argument(kind >= 0 && kind <= 2,
                 "kind is " + std::to_string(kind) + ", expected 0, 1 or 2");
  check_shape(pred, "pred", {params.grid.batch, kAny, patch_elements(params.grid)});
  params.dtype = dtype_of(pred.scalar_type(), "pred", false);
  params.length = pred.size(1);
  if (mask.has_value()) {
    check_shape(*mask, "mask", {params.grid.batch, patch_count(params.grid)});
    check_dtype(*mask, "mask", ScalarType::Bool);
    check_argument(params.length == patch_count(params.grid),
                   "pred has " + std::to_string(params.length) + " patches per image, mask has " +
                       std::to_string(patch_count(params.grid)));
  } else {
    check_shape(*ids, "ids", {params.grid.batch, params.length});
    check_dtype(*ids, "ids", ScalarType::Long);
  }
  LossInputs inputs = {rows_of(pred), rows_of(images), rows_of(ids), rows_of(mask),
                       channel_constants(scale, shift, params.grid.channels)};
  params.pred = view_rows(inputs.pred);
  params.images = view_images(inputs.images, inputs.constants);
  if (inputs.ids.has_value()) params.ids = view_ids(*inputs.ids);
  if (inputs.mask.has_value()) params.mask = view_mask(*inputs.mask);
  params.has_mask = mask.has_value();
  params.norm_pix = norm_pix;
  params.kind = static_cast<LossKind>(kind);
  params.beta = static_cast<float>(beta);
  params.channels_last = channels_last;
  params.mean = mean;
  return inputs;
}

inline Tensor masked_patch_loss_fwd(const Tensor& pred, const Tensor& images, OptionalTensor ids,
                                    OptionalTensor mask, int64_t patch_t, int64_t patch_h,
                                    int64_t patch_w, OptionalTensor scale, OptionalTensor shift,
                                    bool norm_pix, int64_t kind, double beta, bool channels_last,
                                    bool mean) {
  MaskedPatchLossParams params;
  const LossInputs inputs =
      set_loss_inputs(params, pred, images, ids, mask, patch_t, patch_h, patch_w, scale, shift,
                      norm_pix, kind, beta, channels_last, mean);
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
      set_loss_inputs(params, pred, images, ids, mask, patch_t, patch_h, patch_w, scale, shift,
                      norm_pix, kind, beta, channels_last, mean);
  check_dtype(grad, "grad", ScalarType::Float);
  if (mean) {
    check_shape(grad, "grad", {});
  } else {
    check_shape(grad, "grad", {params.grid.batch, params.length});
    params.grad_strides[0] = grad.stride(0);
    params.grad_strides[1] = grad.stride(1);
  }
  params.grad = static_cast<const float*>(grad.data_ptr());
  Tensor dpred = new_output({params.grid.batch, params.length, pred.size(2)}, pred.scalar_type());
  params.dpred = dpred.data_ptr();
  raise_if_failed(cpu_kernels().masked_patch_loss_bwd(params, &torch_pool), "masked_patch_loss",
                  "ids", false);
  return dpred;
}

}  // namespace mimkernels::binding

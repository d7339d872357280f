// Bindings of masked_patch_loss, for every device.
#pragma once

#include "ops/masked_patch_loss/params.h"
#include "torch/image_args.h"

namespace mimkernels::binding {

// What forward and backward have in common. The tensors stay alive beside the pointers into them.
template <typename Device>
struct LossInputs {
  ImageInputs<Device> images;
  Tensor pred;
  OptionalTensor ids;
  OptionalTensor mask;

  LossInputs(MaskedPatchLossParams& params, Device& device, const Tensor& pred_any,
             const Tensor& images_any, const OptionalTensor& ids_any,
             const OptionalTensor& mask_any, int64_t patch_t, int64_t patch_h, int64_t patch_w,
             const OptionalTensor& scale, const OptionalTensor& shift, bool norm_pix, int64_t kind,
             double beta, bool channels_last, bool mean, int64_t local_norm)
      : images(device, images_any, patch_t, patch_h, patch_w, scale, shift),
        pred(take(device, pred_any, "pred",
                  {images.grid.batch, kAnySize, patch_elements(images.grid)})) {
    const int64_t patches = patch_count(images.grid);
    require(ids_any.has_value() != mask_any.has_value(), "ids or mask, not both");
    require(kind >= 0 && kind <= 2, "kind is 0, 1 or 2");
    require(local_norm == 0 || (local_norm > 0 && local_norm % 2 == 1), "local_norm is odd or 0");
    require(local_norm == 0 || !norm_pix, "norm_pix or local_norm, not both");
    params.grid = images.grid;
    params.images = images.view;
    params.dtype = dtype_of(pred, "pred");
    params.pred = view_rows(pred);
    params.length = pred.size(1);
    ids = take(device, ids_any, "ids", {images.grid.batch, params.length}, ScalarType::Long);
    if (mask_any.has_value() && mask_any->dim() == 3) {
      take_cells(params, device, *mask_any);
    } else {
      mask = take(device, mask_any, "mask", {images.grid.batch, patches}, ScalarType::Bool);
    }
    require(!mask.has_value() || params.length == patches, "pred has the patches of mask");
    if (ids.has_value()) {
      device.check_ids(Device::kOp, "ids", *ids, patches, false);
      params.ids = view_ids(*ids);
    }
    params.mask = view_mask(mask);
    params.norm_pix = norm_pix;
    params.kind = static_cast<LossKind>(kind);
    params.beta = static_cast<float>(beta);
    params.channels_last = channels_last;
    params.mean = mean;
    params.local_norm = local_norm;
  }

 private:
  // A mask [B, rows, columns], whose cells divide the patches.
  void take_cells(MaskedPatchLossParams& params, const Device& device, const Tensor& cells) {
    const PatchGrid& grid = images.grid;
    require(images.images.dim() == 4, "images of rank 4 with a mask of rank 3");
    mask = take(device, cells, "mask", {grid.batch, kAnySize, kAnySize}, ScalarType::Bool);
    params.mask_stride_row = mask->stride(1);
    params.cells_h = cells_of(mask->size(1), grid.height / grid.patch_h, grid.patch_h);
    params.cells_w = cells_of(mask->size(2), grid.width / grid.patch_w, grid.patch_w);
  }

  // How many of `cells` belong to each of `patches`, which have `pixels`.
  static int64_t cells_of(int64_t cells, int64_t patches, int64_t pixels) {
    const int64_t each = patches > 0 ? cells / patches : 1;
    require(each * patches == cells && each >= 1 && pixels % each == 0,
            "the cells of mask divide the patches");
    return each;
  }
};

template <typename Device>
Tensor masked_patch_loss_fwd(const Tensor& pred, const Tensor& images, OptionalTensor ids,
                             OptionalTensor mask, int64_t patch_t, int64_t patch_h, int64_t patch_w,
                             OptionalTensor scale, OptionalTensor shift, bool norm_pix,
                             int64_t kind, double beta, bool channels_last, bool mean,
                             int64_t local_norm) {
  Device device(pred);
  MaskedPatchLossParams params;
  const LossInputs<Device> inputs(params, device, pred, images, ids, mask, patch_t, patch_h,
                                  patch_w, scale, shift, norm_pix, kind, beta, channels_last, mean,
                                  local_norm);
  Tensor loss = mean ? device.empty({}, ScalarType::Float)
                     : device.empty({params.grid.batch, params.length}, ScalarType::Float);
  params.loss = floats(loss);
  device.run(params);
  return loss;
}

template <typename Device>
Tensor masked_patch_loss_bwd(const Tensor& grad, const Tensor& pred, const Tensor& images,
                             OptionalTensor ids, OptionalTensor mask, int64_t patch_t,
                             int64_t patch_h, int64_t patch_w, OptionalTensor scale,
                             OptionalTensor shift, bool norm_pix, int64_t kind, double beta,
                             bool channels_last, bool mean, int64_t local_norm) {
  Device device(pred);
  MaskedPatchLossParams params;
  const LossInputs<Device> inputs(params, device, pred, images, ids, mask, patch_t, patch_h,
                                  patch_w, scale, shift, norm_pix, kind, beta, channels_last, mean,
                                  local_norm);
  // One number for the mean, else one per patch, by stride.
  if (mean) {
    check(device, grad, "grad", {}, ScalarType::Float);
  } else {
    check(device, grad, "grad", {params.grid.batch, params.length}, ScalarType::Float);
    params.grad_strides[0] = grad.stride(0);
    params.grad_strides[1] = grad.stride(1);
  }
  params.grad = floats(grad);
  Tensor dpred = device.empty({params.grid.batch, params.length, inputs.pred.size(2)},
                              inputs.pred.scalar_type());
  params.dpred = dpred.data_ptr();
  device.run(params);
  return dpred;
}

}  // namespace mimkernels::binding

// Bindings of patchify_gather, for every device.
#pragma once

#include "ops/patchify_gather/params.h"
#include "torch/image_args.h"

namespace mimkernels::binding {

// ids of either direction; without them every patch, in order. Sets ids, masks and kept.
template <typename Params, typename Device>
OptionalTensor take_patch_ids(Params& params, Device& device, const OptionalTensor& ids_any) {
  params.masks = 1;
  params.kept = patch_count(params.grid);
  if (!ids_any.has_value()) return std::nullopt;
  const Tensor ids = take_ids(params, device, *ids_any, params.grid.batch);
  device.check_ids(Device::kOp, "ids", ids, patch_count(params.grid), true);
  return ids;
}

template <typename Device>
Tensor patchify_gather_fwd(const Tensor& images_any, OptionalTensor ids_any, int64_t patch_t,
                           int64_t patch_h, int64_t patch_w, OptionalTensor scale_any,
                           OptionalTensor shift_any, ScalarType type) {
  Device device(images_any);
  PatchifyGatherFwdParams params;
  const ImageInputs<Device> inputs(device, images_any, patch_t, patch_h, patch_w, scale_any,
                                   shift_any);
  params.grid = inputs.grid;
  params.images = inputs.view;
  params.out_dtype = dtype_of(type, "the output");
  const OptionalTensor ids = take_patch_ids(params, device, ids_any);
  Tensor out = device.empty(
      {params.masks * params.grid.batch, params.kept, patch_elements(params.grid)}, type);
  params.out = out.data_ptr();
  device.run(params);
  return out;
}

template <typename Device>
Tensor patchify_gather_bwd(const Tensor& grad_any, OptionalTensor ids_any, int64_t batch,
                           int64_t channels, int64_t frames, int64_t height, int64_t width,
                           int64_t patch_t, int64_t patch_h, int64_t patch_w,
                           OptionalTensor scale_any, ScalarType type) {
  Device device(grad_any);
  PatchifyGatherBwdParams params;
  params.grid = {batch, channels, frames, height, width, patch_t, patch_h, patch_w};
  check_grid(params.grid);
  params.out_dtype = dtype_of(type, "dimages");
  const OptionalTensor ids = take_patch_ids(params, device, ids_any);
  const Tensor grad = take(device, grad_any, "grad",
                           {params.masks * batch, params.kept, patch_elements(params.grid)});
  params.grad_dtype = dtype_of(grad, "grad");
  params.grad = view_rows(grad);
  const OptionalTensor scale = take_channels(device, scale_any, "scale", channels);
  params.has_scale = scale.has_value();
  if (params.has_scale) params.scale = floats(*scale);
  Tensor dimages = device.empty({batch, channels, frames, height, width}, type);
  params.dimages = dimages.data_ptr();
  device.run(params);
  return dimages;
}

}  // namespace mimkernels::binding

// Bindings of patchify_gather, and what it shares with the loss: images cut into a grid of patches.
#pragma once

#include "../cpu/dispatch.h"
#include "tensor_args.h"

namespace mimkernels::binding {

inline void check_grid(const PatchGrid& grid) {
  check_size(grid.patch_t, "patch_t", 1);
  check_size(grid.patch_h, "patch_h", 1);
  check_size(grid.patch_w, "patch_w", 1);
  const int64_t size[3] = {grid.frames, grid.height, grid.width};
  const int64_t patch[3] = {grid.patch_t, grid.patch_h, grid.patch_w};
  for (int d = 0; d < 3; ++d) {
    check_argument(size[d] % patch[d] == 0, "patches of " + shape_text(patch, 3) +
                                                " do not divide images of " + shape_text(size, 3));
  }
}

inline PatchGrid grid_of(const Tensor& images, int64_t patch_t, int64_t patch_h, int64_t patch_w) {
  check_shape(images, "images", {kAny, kAny, kAny, kAny, kAny});
  PatchGrid grid;
  grid.batch = images.size(0);
  grid.channels = images.size(1);
  grid.frames = images.size(2);
  grid.height = images.size(3);
  grid.width = images.size(4);
  grid.patch_t = patch_t;
  grid.patch_h = patch_h;
  grid.patch_w = patch_w;
  check_grid(grid);
  return grid;
}

inline int64_t patch_count(const PatchGrid& grid) {
  return (grid.frames / grid.patch_t) * (grid.height / grid.patch_h) * (grid.width / grid.patch_w);
}

inline int64_t patch_elements(const PatchGrid& grid) {
  return grid.channels * grid.patch_t * grid.patch_h * grid.patch_w;
}

// Per-channel constants, kept alive beside the pointers into them.
struct ChannelConstants {
  OptionalTensor scale;
  OptionalTensor shift;
};

inline OptionalTensor channel_constant(const OptionalTensor& tensor, const char* name,
                                       int64_t channels) {
  if (!tensor.has_value()) return std::nullopt;
  check_shape(*tensor, name, {channels});
  check_dtype(*tensor, name, ScalarType::Float);
  return rows_of(tensor);
}

inline ChannelConstants channel_constants(const OptionalTensor& scale, const OptionalTensor& shift,
                                          int64_t channels) {
  check_argument(scale.has_value() == shift.has_value(),
                 "scale and shift go together: give both or neither");
  return {channel_constant(scale, "scale", channels), channel_constant(shift, "shift", channels)};
}

inline Images view_images(const Tensor& images, const ChannelConstants& constants) {
  Images view;
  view.data = images.data_ptr();
  view.dtype = dtype_of(images.scalar_type(), "images", true);
  view.stride_batch = images.stride(0);
  view.stride_channel = images.stride(1);
  view.stride_frame = images.stride(2);
  view.stride_row = images.stride(3);
  if (constants.scale.has_value()) {
    view.scale = static_cast<const float*>(constants.scale->data_ptr());
    view.shift = static_cast<const float*>(constants.shift->data_ptr());
  }
  return view;
}

inline Tensor patchify_gather_fwd(const Tensor& images_any, OptionalTensor ids_any, int64_t patch_t,
                                  int64_t patch_h, int64_t patch_w, OptionalTensor scale,
                                  OptionalTensor shift, ScalarType type) {
  PatchifyGatherFwdParams params;
  params.grid = grid_of(images_any, patch_t, patch_h, patch_w);
  params.out_dtype = dtype_of(type, "the output", false);
  const ChannelConstants constants = channel_constants(scale, shift, params.grid.channels);
  const Tensor images = rows_of(images_any);
  params.images = view_images(images, constants);
  params.masks = 1;
  params.kept = patch_count(params.grid);
  const OptionalTensor ids = rows_of(ids_any);
  if (ids.has_value()) {
    check_shape(*ids, "ids", {kAny, params.grid.batch, kAny});
    check_dtype(*ids, "ids", ScalarType::Long);
    params.masks = ids->size(0);
    params.kept = ids->size(2);
    params.has_ids = true;
    params.ids = view_ids(*ids);
  }
  Tensor out = new_output(
      {params.masks * params.grid.batch, params.kept, patch_elements(params.grid)}, type);
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().patchify_gather_fwd(params, &torch_pool), "patchify_gather", "ids",
                  true);
  return out;
}

inline Tensor patchify_gather_bwd(const Tensor& grad_any, OptionalTensor ids_any, int64_t batch,
                                  int64_t channels, int64_t frames, int64_t height, int64_t width,
                                  int64_t patch_t, int64_t patch_h, int64_t patch_w,
                                  OptionalTensor scale_any, ScalarType type) {
  const int64_t sizes[5] = {batch, channels, frames, height, width};
  for (const int64_t size : sizes) check_size(size, "an image size", 0);
  PatchifyGatherBwdParams params;
  params.grid = {batch, channels, frames, height, width, patch_t, patch_h, patch_w};
  check_grid(params.grid);
  params.out_dtype = dtype_of(type, "dimages", false);
  params.masks = 1;
  params.kept = patch_count(params.grid);
  const OptionalTensor ids = rows_of(ids_any);
  if (ids.has_value()) {
    check_shape(*ids, "ids", {kAny, batch, kAny});
    check_dtype(*ids, "ids", ScalarType::Long);
    params.masks = ids->size(0);
    params.kept = ids->size(2);
    params.has_ids = true;
    params.ids = view_ids(*ids);
  }
  check_shape(grad_any, "grad", {params.masks * batch, params.kept, patch_elements(params.grid)});
  params.grad_dtype = dtype_of(grad_any.scalar_type(), "grad", false);
  const Tensor grad = rows_of(grad_any);
  params.grad = view_rows(grad);
  const OptionalTensor scale = channel_constant(scale_any, "scale", channels);
  if (scale.has_value()) params.scale = static_cast<const float*>(scale->data_ptr());
  Tensor dimages = new_output({batch, channels, frames, height, width}, type);
  params.dimages = dimages.data_ptr();
  raise_if_failed(cpu_kernels().patchify_gather_bwd(params, &torch_pool), "patchify_gather", "ids",
                  true);
  return dimages;
}

}  // namespace mimkernels::binding

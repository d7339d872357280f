// Images cut into a grid of patches, as parameters of kernels: for patchify_gather and the loss, on
// the CPU and on CUDA. `check(tensor, name, sizes)` refuses other sizes, kAny apart, and devices.
#pragma once

#include "torch/tensor_args.h"

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

// Images [B, C, H, W] or [B, C, T, H, W].
template <typename Check>
PatchGrid grid_of(const Check& check, const Tensor& images, int64_t patch_t, int64_t patch_h,
                  int64_t patch_w) {
  const bool video = images.dim() == 5;
  if (video) {
    check(images, "images", {kAny, kAny, kAny, kAny, kAny});
  } else {
    check(images, "images", {kAny, kAny, kAny, kAny});
  }
  PatchGrid grid;
  grid.batch = images.size(0);
  grid.channels = images.size(1);
  grid.frames = video ? images.size(2) : 1;
  grid.height = images.size(images.dim() - 2);
  grid.width = images.size(images.dim() - 1);
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

template <typename Check>
OptionalTensor channel_constant(const Check& check, const OptionalTensor& tensor, const char* name,
                                int64_t channels) {
  if (!tensor.has_value()) return std::nullopt;
  check(*tensor, name, {channels});
  check_dtype(*tensor, name, ScalarType::Float);
  return rows_of(tensor);
}

template <typename Check>
ChannelConstants channel_constants(const Check& check, const OptionalTensor& scale,
                                   const OptionalTensor& shift, int64_t channels) {
  check_argument(scale.has_value() == shift.has_value(),
                 "scale and shift go together: give both or neither");
  return {channel_constant(check, scale, "scale", channels),
          channel_constant(check, shift, "shift", channels)};
}

inline Images view_images(const Tensor& images, const ChannelConstants& constants) {
  Images view;
  view.data = images.data_ptr();
  view.dtype = dtype_of(images.scalar_type(), "images", true);
  view.stride_batch = images.stride(0);
  view.stride_channel = images.stride(1);
  view.stride_frame = images.dim() == 5 ? images.stride(2) : 0;
  view.stride_row = images.stride(images.dim() - 2);
  if (constants.scale.has_value()) {
    view.has_scale = true;
    view.scale = static_cast<const float*>(constants.scale->data_ptr());
    view.shift = static_cast<const float*>(constants.shift->data_ptr());
  }
  return view;
}

// The tensors whose memory a call of patchify_gather reads, alive until it returns.
struct PatchifyInputs {
  Tensor main;  // images or grad
  OptionalTensor ids;
  ChannelConstants constants;
};

// ids of either direction; without them every patch, in order. Sets masks and kept.
template <typename Params, typename Check>
OptionalTensor set_patch_ids(Params& params, const Check& check, const OptionalTensor& ids_any) {
  params.masks = 1;
  params.kept = patch_count(params.grid);
  const OptionalTensor ids = rows_of(ids_any);
  if (ids.has_value()) {
    set_masks(params, check, *ids, params.grid.batch);
    params.ids = view_ids(*ids);
  }
  return ids;
}

template <typename Check>
PatchifyInputs set_patchify_fwd(PatchifyGatherFwdParams& params, const Check& check,
                                const Tensor& images, const OptionalTensor& ids, int64_t patch_t,
                                int64_t patch_h, int64_t patch_w, const OptionalTensor& scale,
                                const OptionalTensor& shift, ScalarType type) {
  params.grid = grid_of(check, images, patch_t, patch_h, patch_w);
  params.out_dtype = dtype_of(type, "the output", false);
  PatchifyInputs inputs = {rows_of(images), set_patch_ids(params, check, ids),
                           channel_constants(check, scale, shift, params.grid.channels)};
  params.images = view_images(inputs.main, inputs.constants);
  return inputs;
}

template <typename Check>
PatchifyInputs set_patchify_bwd(PatchifyGatherBwdParams& params, const Check& check,
                                const Tensor& grad, const OptionalTensor& ids,
                                const PatchGrid& grid, const OptionalTensor& scale,
                                ScalarType type) {
  const int64_t sizes[5] = {grid.batch, grid.channels, grid.frames, grid.height, grid.width};
  for (const int64_t size : sizes) check_size(size, "an image size", 0);
  check_grid(grid);
  params.grid = grid;
  params.out_dtype = dtype_of(type, "dimages", false);
  PatchifyInputs inputs = {rows_of(grad), set_patch_ids(params, check, ids), {}};
  check(grad, "grad", {params.masks * grid.batch, params.kept, patch_elements(grid)});
  params.grad_dtype = dtype_of(grad.scalar_type(), "grad", false);
  params.grad = view_rows(inputs.main);
  inputs.constants.scale = channel_constant(check, scale, "scale", grid.channels);
  if (inputs.constants.scale.has_value()) {
    params.has_scale = true;
    params.scale = static_cast<const float*>(inputs.constants.scale->data_ptr());
  }
  return inputs;
}

}  // namespace mimkernels::binding

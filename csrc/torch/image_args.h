// Images as a grid of patches, for the bindings of patchify_gather and masked_patch_loss.
#pragma once

#include "torch/tensor_args.h"

namespace mimkernels::binding {

inline int64_t patch_count(const PatchGrid& grid) {
  return (grid.frames / grid.patch_t) * (grid.height / grid.patch_h) * (grid.width / grid.patch_w);
}

inline int64_t patch_elements(const PatchGrid& grid) {
  return grid.channels * grid.patch_t * grid.patch_h * grid.patch_w;
}

inline void check_grid(const PatchGrid& grid) {
  require(grid.batch >= 0 && grid.channels >= 0 && grid.frames >= 0 && grid.height >= 0 &&
              grid.width >= 0,
          "no image size is negative");
  require(grid.patch_t >= 1 && grid.patch_h >= 1 && grid.patch_w >= 1, "patch sizes >= 1");
  require(grid.frames % grid.patch_t == 0 && grid.height % grid.patch_h == 0 &&
              grid.width % grid.patch_w == 0,
          "patches divide the images");
}

// Per-channel fp32 constants.
template <typename Device>
OptionalTensor take_channels(const Device& device, const OptionalTensor& tensor, const char* name,
                             int64_t channels) {
  return take(device, tensor, name, {channels}, ScalarType::Float);
}

// Images [B, C, H, W] or [B, C, T, H, W] with their constants, alive beside the pointers into them.
template <typename Device>
struct ImageInputs {
  Tensor images;
  OptionalTensor scale;
  OptionalTensor shift;
  PatchGrid grid;
  Images view;

  ImageInputs(const Device& device, const Tensor& images_any, int64_t patch_t, int64_t patch_h,
              int64_t patch_w, const OptionalTensor& scale_any, const OptionalTensor& shift_any)
      : images(images_any.dim() == 5
                   ? take(device, images_any, "images",
                          {kAnySize, kAnySize, kAnySize, kAnySize, kAnySize})
                   : take(device, images_any, "images", {kAnySize, kAnySize, kAnySize, kAnySize})) {
    const int64_t rank = images.dim();
    const bool video = rank == 5;
    grid = {images.size(0),
            images.size(1),
            video ? images.size(2) : 1,
            images.size(rank - 2),
            images.size(rank - 1),
            patch_t,
            patch_h,
            patch_w};
    check_grid(grid);
    require(scale_any.has_value() == shift_any.has_value(), "scale and shift, or neither");
    scale = take_channels(device, scale_any, "scale", grid.channels);
    shift = take_channels(device, shift_any, "shift", grid.channels);
    view.data = images.data_ptr();
    view.dtype = dtype_of(images.scalar_type(), "images", true);
    view.stride_batch = images.stride(0);
    view.stride_channel = images.stride(1);
    view.stride_frame = video ? images.stride(2) : 0;
    view.stride_row = images.stride(rank - 2);
    view.has_scale = scale.has_value();
    if (!view.has_scale) return;
    view.scale = floats(*scale);
    view.shift = floats(*shift);
  }
};

}  // namespace mimkernels::binding

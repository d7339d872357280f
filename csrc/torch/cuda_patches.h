// Bindings of patchify_gather on CUDA.
#pragma once

#include "ops/patchify_gather/cuda.h"
#include "torch/cuda_common.h"
#include "torch/patch_args.h"

namespace mimkernels::binding {

inline Tensor patchify_gather_fwd(const Tensor& images, OptionalTensor ids, int64_t patch_t,
                                  int64_t patch_h, int64_t patch_w, OptionalTensor scale,
                                  OptionalTensor shift, ScalarType type) {
  PatchifyGatherFwdParams params;
  const PatchifyInputs inputs = set_patchify_fwd(params, SameDevice{images}, images, ids, patch_t,
                                                 patch_h, patch_w, scale, shift, type);
  check_ids("patchify_gather", "ids", inputs.ids, patch_count(params.grid));
  Tensor out = new_output_like(
      images, {params.masks * params.grid.batch, params.kept, patch_elements(params.grid)}, type);
  params.out = out.data_ptr();
  const OnDevice device(images);
  check_cuda(cuda::patchify_gather_fwd(params, current_stream(images)));
  return out;
}

inline Tensor patchify_gather_bwd(const Tensor& grad, OptionalTensor ids, int64_t batch,
                                  int64_t channels, int64_t frames, int64_t height, int64_t width,
                                  int64_t patch_t, int64_t patch_h, int64_t patch_w,
                                  OptionalTensor scale, ScalarType type) {
  PatchifyGatherBwdParams params;
  const PatchGrid grid = {batch, channels, frames, height, width, patch_t, patch_h, patch_w};
  const PatchifyInputs inputs =
      set_patchify_bwd(params, SameDevice{grad}, grad, ids, grid, scale, type);
  check_ids("patchify_gather", "ids", inputs.ids, patch_count(grid));
  Tensor dimages = new_output_like(grad, {batch, channels, frames, height, width}, type);
  params.dimages = dimages.data_ptr();
  const OnDevice device(grad);
  check_cuda(cuda::patchify_gather_bwd(params, current_stream(grad)));
  return dimages;
}

}  // namespace mimkernels::binding

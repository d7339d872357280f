// Bindings of patchify_gather.
#pragma once

#include "cpu/dispatch.h"
#include "torch/patch_args.h"

namespace mimkernels::binding {

inline Tensor patchify_gather_fwd(const Tensor& images, OptionalTensor ids, int64_t patch_t,
                                  int64_t patch_h, int64_t patch_w, OptionalTensor scale,
                                  OptionalTensor shift, ScalarType type) {
  PatchifyGatherFwdParams params;
  const PatchifyInputs inputs = set_patchify_fwd(params, check_shape, images, ids, patch_t, patch_h,
                                                 patch_w, scale, shift, type);
  Tensor out = new_output(
      {params.masks * params.grid.batch, params.kept, patch_elements(params.grid)}, type);
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().patchify_gather_fwd(params, &torch_pool), "patchify_gather", "ids",
                  true);
  return out;
}

inline Tensor patchify_gather_bwd(const Tensor& grad, OptionalTensor ids, int64_t batch,
                                  int64_t channels, int64_t frames, int64_t height, int64_t width,
                                  int64_t patch_t, int64_t patch_h, int64_t patch_w,
                                  OptionalTensor scale, ScalarType type) {
  PatchifyGatherBwdParams params;
  const PatchGrid grid = {batch, channels, frames, height, width, patch_t, patch_h, patch_w};
  const PatchifyInputs inputs = set_patchify_bwd(params, check_shape, grad, ids, grid, scale, type);
  Tensor dimages = new_output({batch, channels, frames, height, width}, type);
  params.dimages = dimages.data_ptr();
  raise_if_failed(cpu_kernels().patchify_gather_bwd(params, &torch_pool), "patchify_gather", "ids",
                  true);
  return dimages;
}

}  // namespace mimkernels::binding

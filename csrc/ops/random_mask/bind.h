// Bindings of random_mask, for every device.
#pragma once

#include "ops/random_mask/params.h"
#include "torch/mask_args.h"

namespace mimkernels::binding {

// Alone of all ops, it may have no tensor among its arguments: `on` is where everything lies.
template <typename Device>
MaskTensors random_mask_fwd(int64_t seed, int64_t offset, OptionalTensor step, int64_t batch,
                            int64_t tokens, int64_t keep, bool sorted, torch::stable::Device on) {
  const Device device(on);
  RandomMaskParams params;
  params.seed = static_cast<uint64_t>(seed);
  params.offset = static_cast<uint64_t>(offset);
  if (step.has_value()) {
    check(device, *step, "step", {}, ScalarType::Long);
    params.step = static_cast<const int64_t*>(step->data_ptr());
  }
  params.batch = batch;
  params.tokens = tokens;
  params.keep = keep;
  params.sorted = sorted;
  return make_masks(device, params);
}

}  // namespace mimkernels::binding

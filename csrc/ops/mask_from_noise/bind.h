// Bindings of mask_from_noise, for every device.
#pragma once

#include "ops/mask_from_noise/params.h"
#include "torch/mask_args.h"

namespace mimkernels::binding {

template <typename Device>
MaskTensors mask_from_noise_fwd(const Tensor& noise_any, int64_t keep, bool sorted) {
  const Device device(noise_any);
  const Tensor noise =
      take(device, noise_any, "noise", {kAnySize, kAnySize}, ScalarType::Float);  // [B, N]
  MaskFromNoiseParams params;
  params.noise = floats(noise);
  params.noise_stride = noise.stride(0);
  params.batch = noise.size(0);
  params.tokens = noise.size(1);
  params.keep = keep;
  params.sorted = sorted;
  return make_masks(device, params);
}

}  // namespace mimkernels::binding

// Bindings of the mask ops.
#pragma once

#include "cpu/dispatch.h"
#include "torch/mask_args.h"

namespace mimkernels::binding {

inline MaskTensors new_masks(int64_t batch, int64_t tokens) {
  return {new_output({batch, tokens}, ScalarType::Long),
          new_output({batch, tokens}, ScalarType::Long),
          new_output({batch, tokens}, ScalarType::Float)};
}

inline MaskTensors random_mask_fwd(int64_t seed, int64_t offset, OptionalTensor step, int64_t batch,
                                   int64_t tokens, int64_t keep, bool sorted,
                                   torch::stable::Device device) {
  check_argument(device.is_cpu(), "random_mask: the cpu backend makes masks on the CPU only");
  RandomMaskParams params =
      random_mask_params(check_shape, seed, offset, step, batch, tokens, keep, sorted);
  if (step.has_value()) {
    params.offset += static_cast<uint64_t>(*static_cast<const int64_t*>(step->data_ptr()));
  }
  MaskTensors out = new_masks(batch, tokens);
  set_outputs(params, out);
  raise_if_failed(cpu_kernels().random_mask_fwd(params, &torch_pool), "random_mask", "", false);
  return out;
}

inline MaskTensors mask_from_noise_fwd(const Tensor& noise_any, int64_t keep, bool sorted) {
  check_shape(noise_any, "noise", {kAny, kAny});
  check_dtype(noise_any, "noise", ScalarType::Float);
  const Tensor noise = rows_of(noise_any);
  MaskFromNoiseParams params = mask_from_noise_params(noise, keep, sorted);
  MaskTensors out = new_masks(params.batch, params.tokens);
  set_outputs(params, out);
  raise_if_failed(cpu_kernels().mask_from_noise_fwd(params, &torch_pool), "mask_from_noise", "",
                  false);
  return out;
}

}  // namespace mimkernels::binding

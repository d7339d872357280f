// Bindings of the mask ops on CUDA.
#pragma once

#include "ops/random_mask/cuda.h"
#include "torch/cuda_common.h"
#include "torch/mask_args.h"

namespace mimkernels::binding {

// Alone of all ops, random_mask may have no tensor among its arguments: the first one made on
// `device` tells where everything is.
inline MaskTensors random_mask_fwd(int64_t seed, int64_t offset, OptionalTensor step, int64_t batch,
                                   int64_t tokens, int64_t keep, bool sorted,
                                   torch::stable::Device device) {
  check_size(batch, "batch", 0);
  check_size(tokens, "tokens", 0);
  const int64_t sizes[2] = {batch, tokens};
  const Tensor mask = torch::stable::empty({sizes, 2}, ScalarType::Float, std::nullopt, device);
  check_tensor(mask, "mask", mask, {batch, tokens});
  RandomMaskParams params =
      random_mask_params(SameDevice{mask}, seed, offset, step, batch, tokens, keep, sorted);
  const OnDevice guard(mask);
  MaskTensors out = {new_output_like(mask, {batch, tokens}, ScalarType::Long),
                     new_output_like(mask, {batch, tokens}, ScalarType::Long), mask};
  set_outputs(params, out);
  const int64_t* const step_ptr =
      step.has_value() ? static_cast<const int64_t*>(step->data_ptr()) : nullptr;
  check_cuda(cuda::random_mask_fwd(params, step_ptr, current_stream(mask)));
  return out;
}

inline MaskTensors mask_from_noise_fwd(const Tensor& noise_any, int64_t keep, bool sorted) {
  check_tensor(noise_any, "noise", noise_any, {kAny, kAny});
  check_dtype(noise_any, "noise", ScalarType::Float);
  const OnDevice guard(noise_any);
  const Tensor noise = rows_of(noise_any);
  MaskFromNoiseParams params = mask_from_noise_params(noise, keep, sorted);
  MaskTensors out = {new_output_like(noise, {params.batch, params.tokens}, ScalarType::Long),
                     new_output_like(noise, {params.batch, params.tokens}, ScalarType::Long),
                     new_output_like(noise, {params.batch, params.tokens}, ScalarType::Float)};
  set_outputs(params, out);
  check_cuda(cuda::mask_from_noise_fwd(params, current_stream(noise)));
  return out;
}

}  // namespace mimkernels::binding

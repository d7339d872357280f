// Bindings of the mask ops.
#pragma once

#include <tuple>

#include "../cpu/dispatch.h"
#include "tensor_args.h"

namespace mimkernels::binding {

using MaskTensors = std::tuple<Tensor, Tensor, Tensor>;

inline void check_keep(int64_t keep, int64_t tokens) {
  check_argument(keep >= 0 && keep <= tokens,
                 "keep is " + std::to_string(keep) + " of " + std::to_string(tokens) +
                     " tokens, expected 0 to " + std::to_string(tokens));
}

inline MaskTensors new_masks(int64_t batch, int64_t tokens) {
  return {new_output({batch, tokens}, ScalarType::Long),
          new_output({batch, tokens}, ScalarType::Long),
          new_output({batch, tokens}, ScalarType::Float)};
}

template <typename Params>
void set_outputs(Params& params, const MaskTensors& out) {
  params.ids_shuffle = static_cast<int64_t*>(std::get<0>(out).data_ptr());
  params.ids_restore = static_cast<int64_t*>(std::get<1>(out).data_ptr());
  params.mask = static_cast<float*>(std::get<2>(out).data_ptr());
}

inline MaskTensors random_mask_fwd(int64_t seed, int64_t offset, OptionalTensor step, int64_t batch,
                                   int64_t tokens, int64_t keep, bool sorted,
                                   torch::stable::Device device) {
  check_argument(device.is_cpu(), "random_mask: the cpu backend makes masks on the CPU only");
  check_size(batch, "batch", 0);
  check_size(tokens, "tokens", 0);
  check_keep(keep, tokens);
  RandomMaskParams params;
  params.seed = static_cast<uint64_t>(seed);
  params.offset = static_cast<uint64_t>(offset);
  if (step.has_value()) {
    check_shape(*step, "step", {});
    check_dtype(*step, "step", ScalarType::Long);
    params.offset += static_cast<uint64_t>(*static_cast<const int64_t*>(step->data_ptr()));
  }
  params.batch = batch;
  params.tokens = tokens;
  params.keep = keep;
  params.sorted = sorted;
  MaskTensors out = new_masks(batch, tokens);
  set_outputs(params, out);
  raise_if_failed(cpu_kernels().random_mask_fwd(params, &torch_pool), "random_mask", "", false);
  return out;
}

inline MaskTensors mask_from_noise_fwd(const Tensor& noise_any, int64_t keep, bool sorted) {
  check_shape(noise_any, "noise", {kAny, kAny});
  check_dtype(noise_any, "noise", ScalarType::Float);
  const Tensor noise = rows_of(noise_any);
  MaskFromNoiseParams params;
  params.noise = static_cast<const float*>(noise.data_ptr());
  params.noise_stride = noise.stride(0);
  params.batch = noise.size(0);
  params.tokens = noise.size(1);
  check_keep(keep, params.tokens);
  params.keep = keep;
  params.sorted = sorted;
  MaskTensors out = new_masks(params.batch, params.tokens);
  set_outputs(params, out);
  raise_if_failed(cpu_kernels().mask_from_noise_fwd(params, &torch_pool), "mask_from_noise", "",
                  false);
  return out;
}

}  // namespace mimkernels::binding

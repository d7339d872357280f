// Arguments of random_mask and mask_from_noise as parameters of their kernels, on the CPU and on
// CUDA; `check` as in patch_args.h.
#pragma once

#include <tuple>

#include "torch/tensor_args.h"

namespace mimkernels::binding {

using MaskTensors = std::tuple<Tensor, Tensor, Tensor>;

inline void check_keep(int64_t keep, int64_t tokens) {
  check_argument(keep >= 0 && keep <= tokens,
                 "keep is " + std::to_string(keep) + " of " + std::to_string(tokens) +
                     " tokens, expected 0 to " + std::to_string(tokens));
}

template <typename Params>
void set_outputs(Params& params, const MaskTensors& out) {
  params.ids_shuffle = static_cast<int64_t*>(std::get<0>(out).data_ptr());
  params.ids_restore = static_cast<int64_t*>(std::get<1>(out).data_ptr());
  params.mask = static_cast<float*>(std::get<2>(out).data_ptr());
}

// All but the device's part: `step`, whose value is added to the offset, is read by the caller.
template <typename Check>
RandomMaskParams random_mask_params(const Check& check, int64_t seed, int64_t offset,
                                    const OptionalTensor& step, int64_t batch, int64_t tokens,
                                    int64_t keep, bool sorted) {
  check_size(batch, "batch", 0);
  check_size(tokens, "tokens", 0);
  check_keep(keep, tokens);
  if (step.has_value()) {
    check(*step, "step", {});
    check_dtype(*step, "step", ScalarType::Long);
  }
  RandomMaskParams params;
  params.seed = static_cast<uint64_t>(seed);
  params.offset = static_cast<uint64_t>(offset);
  params.batch = batch;
  params.tokens = tokens;
  params.keep = keep;
  params.sorted = sorted;
  return params;
}

// `noise` with its last dim contiguous.
inline MaskFromNoiseParams mask_from_noise_params(const Tensor& noise, int64_t keep, bool sorted) {
  MaskFromNoiseParams params;
  params.noise = static_cast<const float*>(noise.data_ptr());
  params.noise_stride = noise.stride(0);
  params.batch = noise.size(0);
  params.tokens = noise.size(1);
  check_keep(keep, params.tokens);
  params.keep = keep;
  params.sorted = sorted;
  return params;
}

}  // namespace mimkernels::binding

// Outputs of random_mask and mask_from_noise.
#pragma once

#include <tuple>

#include "torch/tensor_args.h"

namespace mimkernels::binding {

using MaskTensors = std::tuple<Tensor, Tensor, Tensor>;  // ids_shuffle, ids_restore, mask: [B, N]

// params has its sizes.
template <typename Device, typename Params>
MaskTensors make_masks(const Device& device, Params& params) {
  require(params.batch >= 0 && params.tokens >= 0, "batch >= 0 and tokens >= 0");
  require(params.keep >= 0 && params.keep <= params.tokens, "0 <= keep <= tokens");
  Tensor ids_shuffle = device.empty({params.batch, params.tokens}, ScalarType::Long);
  Tensor ids_restore = device.empty({params.batch, params.tokens}, ScalarType::Long);
  Tensor mask = device.empty({params.batch, params.tokens}, ScalarType::Float);
  params.ids_shuffle = static_cast<int64_t*>(ids_shuffle.data_ptr());
  params.ids_restore = static_cast<int64_t*>(ids_restore.data_ptr());
  params.mask = floats(mask);
  device.run(params);
  return {ids_shuffle, ids_restore, mask};
}

}  // namespace mimkernels::binding

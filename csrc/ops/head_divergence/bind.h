// Bindings of head_divergence, for every device.
#pragma once

#include "ops/head_divergence/params.h"
#include "torch/score_args.h"

namespace mimkernels::binding {

template <typename Device>
Tensor head_divergence_fwd(const Tensor& q, const Tensor& k, const Tensor& lse_any,
                           OptionalTensor bias, OptionalTensor bias_table,
                           OptionalTensor bias_index, OptionalTensor key_mask,
                           OptionalTensor logit_scale, double scale) {
  Device device(q);
  const ScoreInputs<Device> inputs(device, q, k, bias, bias_table, bias_index, key_mask,
                                   logit_scale, scale);
  const AttentionScores& s = inputs.scores;
  const Tensor lse = inputs.take_lse(lse_any, "lse");
  HeadDivergenceParams params;
  params.scores = s;
  params.lse = floats(lse);
  Tensor out = device.empty({s.batch, s.heads, s.heads}, ScalarType::Float);
  params.out = floats(out);
  device.run(params);
  return out;
}

}  // namespace mimkernels::binding

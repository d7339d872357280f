// Bindings of weighted_pool, for every device.
#pragma once

#include <tuple>

#include "torch/pool_args.h"

namespace mimkernels::binding {

// The tokens, which are the values, too; `scores`, or in the backward the weights, says how many
// rows of them there are: [B, G, N], or [B, N] for one.
template <typename Params, typename Device>
PooledTokens<Device> take_weighted(Params& params, const Device& device, const Tensor& x,
                                   const OptionalTensor& mask, int64_t num_prefix,
                                   const Tensor& scores, bool normalize) {
  PooledTokens<Device> pooled(params, device, x, mask, num_prefix);
  params.groups = scores.dim() == 3 ? scores.size(1) : 1;
  params.width = params.dim;
  params.softmax = normalize;
  params.pools_x = true;
  params.values = params.x;
  return pooled;
}

template <typename Device>
std::tuple<Tensor, Tensor> weighted_pool_fwd(const Tensor& x, const Tensor& scores_any,
                                             OptionalTensor mask, bool normalize,
                                             int64_t num_prefix) {
  const Device device(x);
  TokenPoolFwdParams params;
  const auto pooled = take_weighted(params, device, x, mask, num_prefix, scores_any, normalize);
  const Tensor scores = take_groups(device, scores_any, "scores", params.batch, params.groups,
                                    params.tokens, ScalarType::Float);
  params.scores = view_groups(scores);
  return run_token_pool_fwd(device, params, pooled.type(), scores.dim() == 2);
}

template <typename Device>
std::tuple<Tensor, Tensor> weighted_pool_bwd(const Tensor& dout, OptionalTensor dweights,
                                             const Tensor& x, const Tensor& weights,
                                             OptionalTensor mask, bool normalize,
                                             int64_t num_prefix, bool need_x, bool need_scores) {
  const Device device(x);
  TokenPoolBwdParams params;
  const auto pooled = take_weighted(params, device, x, mask, num_prefix, weights, normalize);
  const ScalarType type = pooled.type();
  const PoolGradients<Device> gradients(params, device, type, dout, dweights, weights);
  Tensor dx = empty_if(device, need_x, {params.batch, params.tokens, params.dim}, type);
  Tensor dscores =
      weights.dim() == 2
          ? empty_if(device, need_scores, {params.batch, params.tokens}, ScalarType::Float)
          : empty_if(device, need_scores, {params.batch, params.groups, params.tokens},
                     ScalarType::Float);
  params.dx = output_ptr(need_x, dx);
  params.dscores = static_cast<float*>(output_ptr(need_scores, dscores));
  device.run(params);
  return {dx, dscores};
}

}  // namespace mimkernels::binding

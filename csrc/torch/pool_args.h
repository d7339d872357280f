// Tokens that are pooled, for the bindings of query_pool, weighted_pool and reduce_pool; and what
// the first two, whose kernels are token_pool, have in common.
#pragma once

#include <tuple>
#include <utility>

#include "core/token_pool.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// x [B, N, D] and its mask, alive beside the pointers into them.
template <typename Device>
struct PooledTokens {
  Tensor x;
  OptionalTensor mask;

  template <typename Params>
  PooledTokens(Params& params, const Device& device, const Tensor& x_any,
               const OptionalTensor& mask_any, int64_t num_prefix)
      : x(take(device, x_any, "x", {kAnySize, kAnySize, kAnySize})),
        mask(take(device, mask_any, "mask", {x.size(0), x.size(1)}, ScalarType::Bool)) {
    params.dtype = dtype_of(x, "x");
    params.batch = x.size(0);
    params.tokens = x.size(1);
    params.dim = x.size(2);
    require(num_prefix >= 0 && num_prefix <= params.tokens, "0 <= num_prefix <= tokens of x");
    params.num_prefix = num_prefix;
    params.x = view_rows(x);
    params.mask = view_mask(mask);
  }

  ScalarType type() const { return x.scalar_type(); }
};

// [B, G, size], or, for one group, [B, size].
template <typename Device>
Tensor take_groups(const Device& device, const Tensor& tensor, const char* name, int64_t batch,
                   int64_t groups, int64_t size, ScalarType type) {
  if (tensor.dim() == 2 && (groups == 1 || groups == kAnySize)) {
    return take(device, tensor, name, {batch, size}, type);
  }
  return take(device, tensor, name, {batch, groups, size}, type);
}

inline Rows view_groups(const Tensor& tensor) {
  Rows rows = view_rows(tensor);
  if (tensor.dim() == 2) std::swap(rows.stride0, rows.stride1);
  return rows;
}

// Columns of one group's result.
template <typename Params>
int64_t out_width(const Params& params) {
  return params.sliced ? params.width / params.groups : params.width;
}

// Makes out and weights, without the dim of groups where there is one group and `flat`.
template <typename Device>
std::tuple<Tensor, Tensor> run_token_pool_fwd(const Device& device, TokenPoolFwdParams& params,
                                              ScalarType type, bool flat) {
  const int64_t width = out_width(params);
  Tensor out = flat ? device.empty({params.batch, width}, type)
                    : device.empty({params.batch, params.groups, width}, type);
  Tensor weights =
      flat ? device.empty({params.batch, params.tokens}, ScalarType::Float)
           : device.empty({params.batch, params.groups, params.tokens}, ScalarType::Float);
  params.out = out.data_ptr();
  params.weights = floats(weights);
  device.run(params);
  return {out, weights};
}

// dout, dweights and the weights of the forward; params has its sizes.
template <typename Device>
struct PoolGradients {
  Tensor dout;
  OptionalTensor dweights;
  Tensor weights;

  PoolGradients(TokenPoolBwdParams& params, const Device& device, ScalarType type,
                const Tensor& dout_any, const OptionalTensor& dweights_any,
                const Tensor& weights_any)
      : dout(take_groups(device, dout_any, "dout", params.batch, params.groups, out_width(params),
                         type)),
        weights(torch::stable::contiguous(take_groups(device, weights_any, "weights", params.batch,
                                                      params.groups, params.tokens,
                                                      ScalarType::Float))) {
    params.dout = view_groups(dout);
    params.weights = floats(weights);
    if (!dweights_any.has_value()) return;
    dweights = take_groups(device, *dweights_any, "dweights", params.batch, params.groups,
                           params.tokens, ScalarType::Float);
    params.dweights = view_groups(*dweights);
  }
};

}  // namespace mimkernels::binding

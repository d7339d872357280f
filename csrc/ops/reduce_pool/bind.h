// Bindings of reduce_pool, for every device.
#pragma once

#include <tuple>

#include "ops/reduce_pool/params.h"
#include "torch/pool_args.h"

namespace mimkernels::binding {

// The exponent of the power mean, else none.
template <typename Device>
OptionalTensor take_exponent(ReducePoolParams& params, const Device& device, int64_t kind,
                             const OptionalTensor& p_any, double eps) {
  require(kind >= 0 && kind <= 2, "kind is 0, 1 or 2");
  params.kind = static_cast<ReduceKind>(kind);
  params.eps = static_cast<float>(eps);
  if (params.kind != ReduceKind::kGem) return std::nullopt;
  require(p_any.has_value(), "the power mean has p");
  const Tensor p = take(device, *p_any, "p", {1}, ScalarType::Float);
  params.p = floats(p);
  return p;
}

template <typename Device>
std::tuple<Tensor, Tensor> reduce_pool_fwd(const Tensor& x, OptionalTensor mask, int64_t kind,
                                           int64_t num_prefix, OptionalTensor p_any, double eps) {
  const Device device(x);
  ReducePoolParams params;
  const PooledTokens<Device> pooled(params, device, x, mask, num_prefix);
  const OptionalTensor p = take_exponent(params, device, kind, p_any, eps);
  const bool max = params.kind == ReduceKind::kMax;
  Tensor out = device.empty({params.batch, params.dim}, pooled.type());
  Tensor saved = empty_if(device, params.kind != ReduceKind::kMean, {params.batch, params.dim},
                          max ? ScalarType::Int : ScalarType::Float);
  params.out = out.data_ptr();
  params.index = static_cast<int32_t*>(output_ptr(max, saved));
  params.moment = static_cast<float*>(output_ptr(params.kind == ReduceKind::kGem, saved));
  device.run(params);
  return {out, saved};
}

template <typename Device>
std::tuple<Tensor, Tensor> reduce_pool_bwd(const Tensor& dout_any, OptionalTensor x_any,
                                           const Tensor& saved_any, OptionalTensor mask_any,
                                           int64_t kind, int64_t tokens, int64_t num_prefix,
                                           OptionalTensor p_any, double eps, bool need_x,
                                           bool need_p) {
  const Device device(dout_any);
  ReducePoolParams params;
  const Tensor dout = take(device, dout_any, "dout", {kAnySize, kAnySize});  // [B, D]
  const ScalarType type = dout.scalar_type();
  require(num_prefix >= 0 && num_prefix <= tokens, "0 <= num_prefix <= tokens");
  params.dtype = dtype_of(dout, "dout");
  params.batch = dout.size(0);
  params.dim = dout.size(1);
  params.tokens = tokens;
  params.num_prefix = num_prefix;
  params.dout = view_rows(dout);
  const OptionalTensor mask =
      take(device, mask_any, "mask", {params.batch, tokens}, ScalarType::Bool);
  params.mask = view_mask(mask);
  const OptionalTensor p = take_exponent(params, device, kind, p_any, eps);
  const bool max = params.kind == ReduceKind::kMax, gem = params.kind == ReduceKind::kGem;
  OptionalTensor saved, x;
  if (max || gem) {
    saved = take_contiguous(device, saved_any, "saved", {params.batch, params.dim},
                            max ? ScalarType::Int : ScalarType::Float);
    params.index = max ? static_cast<int32_t*>(saved->data_ptr()) : nullptr;
    params.moment = gem ? floats(*saved) : nullptr;
  }
  if (gem) {
    require(x_any.has_value(), "the gradient of the power mean has x");
    x = take(device, x_any, "x", {params.batch, tokens, params.dim}, type);
    params.x = view_rows(x);
  }
  need_p = need_p && gem;
  Tensor dx = empty_if(device, need_x, {params.batch, tokens, params.dim}, type);
  Tensor dp = empty_if(device, need_p, {1}, ScalarType::Float);
  params.dx = output_ptr(need_x, dx);
  params.dp = static_cast<float*>(output_ptr(need_p, dp));
  device.run(params);
  return {dx, dp};
}

}  // namespace mimkernels::binding

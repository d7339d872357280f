// Bindings of gather_tokens, for every device.
#pragma once

#include <tuple>

#include "ops/gather_tokens/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

template <typename Device>
Tensor gather_tokens_fwd(const Tensor& x_any, const Tensor& ids_any, OptionalTensor pos_any,
                         OptionalTensor prefix_any) {
  Device device(x_any);
  GatherTokensFwdParams params;
  const Tensor x = take(device, x_any, "x", {kAnySize, kAnySize, kAnySize});  // [B, N, D]
  const ScalarType type = x.scalar_type();
  params.dtype = dtype_of(x, "x");
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.dim = x.size(2);
  const Tensor ids = take_ids(params, device, ids_any, params.batch);
  const OptionalTensor pos = take(device, pos_any, "pos", {params.tokens, params.dim}, type);
  const OptionalTensor prefix = take(device, prefix_any, "prefix", {kAnySize, params.dim}, type);
  device.check_ids(Device::kOp, "ids", ids, params.tokens, true);
  params.num_prefix = prefix.has_value() ? prefix->size(0) : 0;
  params.x = view_rows(x);
  params.pos = view_rows(pos);
  params.prefix = view_rows(prefix);
  Tensor out = device.empty(
      {params.masks * params.batch, params.num_prefix + params.kept, params.dim}, type);
  params.out = out.data_ptr();
  device.run(params);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> gather_tokens_bwd(const Tensor& grad_any, const Tensor& ids_any,
                                                     int64_t tokens, int64_t num_prefix,
                                                     bool need_x, bool need_pos, bool need_prefix) {
  Device device(grad_any);
  GatherTokensBwdParams params;
  require(tokens >= 0 && num_prefix >= 0, "tokens >= 0 and num_prefix >= 0");
  const Tensor ids = take_ids(params, device, ids_any, kAnySize);
  params.batch = ids.size(ids.dim() - 2);
  params.tokens = tokens;
  params.num_prefix = num_prefix;
  const Tensor grad =
      take(device, grad_any, "grad",
           {params.masks * params.batch, num_prefix + params.kept, kAnySize});  // [M * B, P + K, D]
  const ScalarType type = grad.scalar_type();
  params.dtype = dtype_of(grad, "grad");
  params.dim = grad.size(2);
  params.grad = view_rows(grad);
  device.check_ids(Device::kOp, "ids", ids, params.tokens, true);
  Tensor dx = empty_if(device, need_x, {params.batch, tokens, params.dim}, type);
  Tensor dpos = empty_if(device, need_pos, {tokens, params.dim}, type);
  Tensor dprefix = empty_if(device, need_prefix, {num_prefix, params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dpos = output_ptr(need_pos, dpos);
  params.dprefix = output_ptr(need_prefix, dprefix);
  device.run(params);
  return {dx, dpos, dprefix};
}

}  // namespace mimkernels::binding

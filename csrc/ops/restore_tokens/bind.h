// Bindings of restore_tokens, for every device.
#pragma once

#include <tuple>

#include "ops/restore_tokens/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

template <typename Device>
Tensor restore_tokens_fwd(const Tensor& x_any, const Tensor& ids_any, const Tensor& token_any,
                          OptionalTensor pos_any, int64_t num_prefix) {
  Device device(x_any);
  RestoreTokensFwdParams params;
  const Tensor x = take(device, x_any, "x", {kAnySize, kAnySize, kAnySize});  // [B, P + K, D]
  const ScalarType type = x.scalar_type();
  require(num_prefix >= 0 && num_prefix <= x.size(1), "0 <= num_prefix <= tokens of x");
  params.dtype = dtype_of(x, "x");
  params.batch = x.size(0);
  params.dim = x.size(2);
  params.num_prefix = num_prefix;
  params.kept = x.size(1) - num_prefix;
  const Tensor ids =
      take(device, ids_any, "ids_restore", {params.batch, kAnySize}, ScalarType::Long);
  params.tokens = ids.size(1);
  const Tensor token = take(device, token_any, "mask_token", {params.dim}, type);
  const OptionalTensor pos =
      take(device, pos_any, "pos", {num_prefix + params.tokens, params.dim}, type);
  device.check_ids(Device::kOp, "ids_restore", ids, params.tokens, false);
  params.x = view_rows(x);
  params.ids_restore = view_ids(ids);
  params.mask_token = token.data_ptr();
  params.pos = view_rows(pos);
  Tensor out = device.empty({params.batch, num_prefix + params.tokens, params.dim}, type);
  params.out = out.data_ptr();
  device.run(params);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> restore_tokens_bwd(const Tensor& grad_any, const Tensor& ids_any,
                                                      int64_t kept, int64_t num_prefix, bool need_x,
                                                      bool need_mask_token, bool need_pos) {
  Device device(grad_any);
  RestoreTokensBwdParams params;
  require(kept >= 0 && num_prefix >= 0, "kept >= 0 and num_prefix >= 0");
  const Tensor ids = take(device, ids_any, "ids_restore", {kAnySize, kAnySize}, ScalarType::Long);
  params.batch = ids.size(0);
  params.tokens = ids.size(1);
  params.kept = kept;
  params.num_prefix = num_prefix;
  const Tensor grad =
      take(device, grad_any, "grad", {params.batch, num_prefix + params.tokens, kAnySize});
  const ScalarType type = grad.scalar_type();
  params.dtype = dtype_of(grad, "grad");
  params.dim = grad.size(2);
  params.grad = view_rows(grad);
  params.ids_restore = view_ids(ids);
  device.check_ids(Device::kOp, "ids_restore", ids, params.tokens, false);
  Tensor dx = empty_if(device, need_x, {params.batch, num_prefix + kept, params.dim}, type);
  Tensor dmask_token = empty_if(device, need_mask_token, {params.dim}, type);
  Tensor dpos = empty_if(device, need_pos, {num_prefix + params.tokens, params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dmask_token = output_ptr(need_mask_token, dmask_token);
  params.dpos = output_ptr(need_pos, dpos);
  device.run(params);
  return {dx, dmask_token, dpos};
}

}  // namespace mimkernels::binding

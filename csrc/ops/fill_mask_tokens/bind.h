// Bindings of fill_mask_tokens, for every device.
#pragma once

#include <tuple>

#include "ops/fill_mask_tokens/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

template <typename Device>
Tensor fill_mask_tokens_fwd(const Tensor& x_any, const Tensor& mask_any, const Tensor& token_any) {
  const Device device(x_any);
  FillMaskTokensFwdParams params;
  const Tensor x = take(device, x_any, "x", {kAnySize, kAnySize, kAnySize});  // [B, N, D]
  const ScalarType type = x.scalar_type();
  params.dtype = dtype_of(x, "x");
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.dim = x.size(2);
  const Tensor mask =
      take(device, mask_any, "mask", {params.batch, params.tokens}, ScalarType::Bool);
  const Tensor token = take(device, token_any, "mask_token", {params.dim}, type);
  params.x = view_rows(x);
  params.mask = view_mask(mask);
  params.mask_token = token.data_ptr();
  Tensor out = device.empty({params.batch, params.tokens, params.dim}, type);
  params.out = out.data_ptr();
  device.run(params);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor> fill_mask_tokens_bwd(const Tensor& grad_any, const Tensor& mask_any,
                                                bool need_x, bool need_mask_token) {
  const Device device(grad_any);
  FillMaskTokensBwdParams params;
  const Tensor grad = take(device, grad_any, "grad", {kAnySize, kAnySize, kAnySize});  // [B, N, D]
  const ScalarType type = grad.scalar_type();
  params.dtype = dtype_of(grad, "grad");
  params.batch = grad.size(0);
  params.tokens = grad.size(1);
  params.dim = grad.size(2);
  const Tensor mask =
      take(device, mask_any, "mask", {params.batch, params.tokens}, ScalarType::Bool);
  params.grad = view_rows(grad);
  params.mask = view_mask(mask);
  Tensor dx = empty_if(device, need_x, {params.batch, params.tokens, params.dim}, type);
  Tensor dmask_token = empty_if(device, need_mask_token, {params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dmask_token = output_ptr(need_mask_token, dmask_token);
  device.run(params);
  return {dx, dmask_token};
}

}  // namespace mimkernels::binding

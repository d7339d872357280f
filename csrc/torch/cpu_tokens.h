// Bindings of the token ops: gather_tokens, restore_tokens, fill_mask_tokens.
#pragma once

#include <tuple>

#include "../cpu/dispatch.h"
#include "tensor_args.h"

namespace mimkernels::binding {

inline Tensor gather_tokens_fwd(const Tensor& x_any, const Tensor& ids_any, OptionalTensor pos_any,
                                OptionalTensor prefix_any) {
  check_shape(x_any, "x", {kAny, kAny, kAny});
  const ScalarType type = x_any.scalar_type();
  GatherTokensFwdParams params;
  params.dtype = dtype_of(type, "x", false);
  params.batch = x_any.size(0);
  params.tokens = x_any.size(1);
  params.dim = x_any.size(2);
  check_shape(ids_any, "ids", {kAny, params.batch, kAny});
  check_dtype(ids_any, "ids", ScalarType::Long);
  params.masks = ids_any.size(0);
  params.kept = ids_any.size(2);
  if (pos_any.has_value()) {
    check_shape(*pos_any, "pos", {params.tokens, params.dim});
    check_dtype(*pos_any, "pos", type);
  }
  if (prefix_any.has_value()) {
    check_shape(*prefix_any, "prefix", {kAny, params.dim});
    check_dtype(*prefix_any, "prefix", type);
    params.num_prefix = prefix_any->size(0);
  }
  const Tensor x = rows_of(x_any);
  const Tensor ids = rows_of(ids_any);
  const OptionalTensor pos = rows_of(pos_any);
  const OptionalTensor prefix = rows_of(prefix_any);
  params.x = view_rows(x);
  params.ids = view_ids(ids);
  params.pos = view_rows(pos);
  params.prefix = view_rows(prefix);
  Tensor out =
      new_output({params.masks * params.batch, params.num_prefix + params.kept, params.dim}, type);
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().gather_tokens_fwd(params, &torch_pool), "gather_tokens", "ids",
                  true);
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor> gather_tokens_bwd(const Tensor& grad_any,
                                                            const Tensor& ids_any, int64_t tokens,
                                                            int64_t num_prefix, bool need_x,
                                                            bool need_pos, bool need_prefix) {
  check_shape(ids_any, "ids", {kAny, kAny, kAny});
  check_dtype(ids_any, "ids", ScalarType::Long);
  check_size(tokens, "tokens", 0);
  check_size(num_prefix, "num_prefix", 0);
  GatherTokensBwdParams params;
  params.masks = ids_any.size(0);
  params.batch = ids_any.size(1);
  params.kept = ids_any.size(2);
  params.tokens = tokens;
  params.num_prefix = num_prefix;
  check_shape(grad_any, "grad", {params.masks * params.batch, num_prefix + params.kept, kAny});
  const ScalarType type = grad_any.scalar_type();
  params.dtype = dtype_of(type, "grad", false);
  params.dim = grad_any.size(2);
  const Tensor grad = rows_of(grad_any);
  const Tensor ids = rows_of(ids_any);
  params.grad = view_rows(grad);
  params.ids = view_ids(ids);
  Tensor dx = new_output_if(need_x, {params.batch, tokens, params.dim}, type);
  Tensor dpos = new_output_if(need_pos, {tokens, params.dim}, type);
  Tensor dprefix = new_output_if(need_prefix, {num_prefix, params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dpos = output_ptr(need_pos, dpos);
  params.dprefix = output_ptr(need_prefix, dprefix);
  raise_if_failed(cpu_kernels().gather_tokens_bwd(params, &torch_pool), "gather_tokens", "ids",
                  true);
  return {dx, dpos, dprefix};
}

inline Tensor restore_tokens_fwd(const Tensor& x_any, const Tensor& ids_any,
                                 const Tensor& token_any, OptionalTensor pos_any,
                                 int64_t num_prefix) {
  check_shape(x_any, "x", {kAny, kAny, kAny});
  const ScalarType type = x_any.scalar_type();
  RestoreTokensFwdParams params;
  params.dtype = dtype_of(type, "x", false);
  params.batch = x_any.size(0);
  params.dim = x_any.size(2);
  check_size(num_prefix, "num_prefix", 0);
  check_size(x_any.size(1), "tokens of x", num_prefix);
  params.num_prefix = num_prefix;
  params.kept = x_any.size(1) - num_prefix;
  check_shape(ids_any, "ids_restore", {params.batch, kAny});
  check_dtype(ids_any, "ids_restore", ScalarType::Long);
  params.tokens = ids_any.size(1);
  check_shape(token_any, "mask_token", {params.dim});
  check_dtype(token_any, "mask_token", type);
  if (pos_any.has_value()) {
    check_shape(*pos_any, "pos", {num_prefix + params.tokens, params.dim});
    check_dtype(*pos_any, "pos", type);
  }
  const Tensor x = rows_of(x_any);
  const Tensor ids = rows_of(ids_any);
  const Tensor token = rows_of(token_any);
  const OptionalTensor pos = rows_of(pos_any);
  params.x = view_rows(x);
  params.ids_restore = view_ids(ids);
  params.mask_token = token.data_ptr();
  params.pos = view_rows(pos);
  Tensor out = new_output({params.batch, num_prefix + params.tokens, params.dim}, type);
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().restore_tokens_fwd(params, &torch_pool), "restore_tokens",
                  "ids_restore", false);
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor> restore_tokens_bwd(const Tensor& grad_any,
                                                             const Tensor& ids_any, int64_t kept,
                                                             int64_t num_prefix, bool need_x,
                                                             bool need_mask_token, bool need_pos) {
  check_shape(ids_any, "ids_restore", {kAny, kAny});
  check_dtype(ids_any, "ids_restore", ScalarType::Long);
  check_size(kept, "kept", 0);
  check_size(num_prefix, "num_prefix", 0);
  RestoreTokensBwdParams params;
  params.batch = ids_any.size(0);
  params.tokens = ids_any.size(1);
  params.kept = kept;
  params.num_prefix = num_prefix;
  check_shape(grad_any, "grad", {params.batch, num_prefix + params.tokens, kAny});
  const ScalarType type = grad_any.scalar_type();
  params.dtype = dtype_of(type, "grad", false);
  params.dim = grad_any.size(2);
  const Tensor grad = rows_of(grad_any);
  const Tensor ids = rows_of(ids_any);
  params.grad = view_rows(grad);
  params.ids_restore = view_ids(ids);
  Tensor dx = new_output_if(need_x, {params.batch, num_prefix + kept, params.dim}, type);
  Tensor dmask_token = new_output_if(need_mask_token, {params.dim}, type);
  Tensor dpos = new_output_if(need_pos, {num_prefix + params.tokens, params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dmask_token = output_ptr(need_mask_token, dmask_token);
  params.dpos = output_ptr(need_pos, dpos);
  raise_if_failed(cpu_kernels().restore_tokens_bwd(params, &torch_pool), "restore_tokens",
                  "ids_restore", false);
  return {dx, dmask_token, dpos};
}

inline BoolMask view_mask(const Tensor& mask) {
  BoolMask view;
  view.data = static_cast<const uint8_t*>(mask.data_ptr());
  view.stride0 = mask.stride(0);
  return view;
}

inline Tensor fill_mask_tokens_fwd(const Tensor& x_any, const Tensor& mask_any,
                                   const Tensor& token_any) {
  check_shape(x_any, "x", {kAny, kAny, kAny});
  const ScalarType type = x_any.scalar_type();
  FillMaskTokensFwdParams params;
  params.dtype = dtype_of(type, "x", false);
  params.batch = x_any.size(0);
  params.tokens = x_any.size(1);
  params.dim = x_any.size(2);
  check_shape(mask_any, "mask", {params.batch, params.tokens});
  check_dtype(mask_any, "mask", ScalarType::Bool);
  check_shape(token_any, "mask_token", {params.dim});
  check_dtype(token_any, "mask_token", type);
  const Tensor x = rows_of(x_any);
  const Tensor mask = rows_of(mask_any);
  const Tensor token = rows_of(token_any);
  params.x = view_rows(x);
  params.mask = view_mask(mask);
  params.mask_token = token.data_ptr();
  Tensor out = new_output({params.batch, params.tokens, params.dim}, type);
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().fill_mask_tokens_fwd(params, &torch_pool), "fill_mask_tokens", "",
                  false);
  return out;
}

inline std::tuple<Tensor, Tensor> fill_mask_tokens_bwd(const Tensor& grad_any,
                                                       const Tensor& mask_any, bool need_x,
                                                       bool need_mask_token) {
  check_shape(grad_any, "grad", {kAny, kAny, kAny});
  const ScalarType type = grad_any.scalar_type();
  FillMaskTokensBwdParams params;
  params.dtype = dtype_of(type, "grad", false);
  params.batch = grad_any.size(0);
  params.tokens = grad_any.size(1);
  params.dim = grad_any.size(2);
  check_shape(mask_any, "mask", {params.batch, params.tokens});
  check_dtype(mask_any, "mask", ScalarType::Bool);
  const Tensor grad = rows_of(grad_any);
  const Tensor mask = rows_of(mask_any);
  params.grad = view_rows(grad);
  params.mask = view_mask(mask);
  Tensor dx = new_output_if(need_x, {params.batch, params.tokens, params.dim}, type);
  Tensor dmask_token = new_output_if(need_mask_token, {params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dmask_token = output_ptr(need_mask_token, dmask_token);
  raise_if_failed(cpu_kernels().fill_mask_tokens_bwd(params, &torch_pool), "fill_mask_tokens", "",
                  false);
  return {dx, dmask_token};
}

}  // namespace mimkernels::binding

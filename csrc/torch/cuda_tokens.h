// Bindings of the ops that gather and restore tokens.
#pragma once

#include <tuple>

#include "../cuda/gather_tokens.h"
#include "cuda_common.h"

namespace mimkernels::binding {

inline Tensor gather_tokens_fwd(const Tensor& x_any, const Tensor& ids_any, OptionalTensor pos_any,
                                OptionalTensor prefix_any) {
  check_tensor(x_any, "x", x_any, {kAny, kAny, kAny});
  const ScalarType type = x_any.scalar_type();
  GatherTokensFwdParams params;
  params.dtype = dtype_of(type, "x", false);
  params.batch = x_any.size(0);
  params.tokens = x_any.size(1);
  params.dim = x_any.size(2);
  check_tensor(ids_any, "ids", x_any, {kAny, params.batch, kAny});
  check_dtype(ids_any, "ids", ScalarType::Long);
  params.masks = ids_any.size(0);
  params.kept = ids_any.size(2);
  if (pos_any.has_value()) {
    check_tensor(*pos_any, "pos", x_any, {params.tokens, params.dim});
    check_dtype(*pos_any, "pos", type);
  }
  if (prefix_any.has_value()) {
    check_tensor(*prefix_any, "prefix", x_any, {kAny, params.dim});
    check_dtype(*prefix_any, "prefix", type);
    params.num_prefix = prefix_any->size(0);
  }
  const OnDevice guard(x_any);
  const Tensor x = rows_of(x_any);
  const Tensor ids = rows_of(ids_any);
  const OptionalTensor pos = rows_of(pos_any);
  const OptionalTensor prefix = rows_of(prefix_any);
  params.x = view_rows(x);
  params.ids = view_ids(ids);
  params.pos = view_rows(pos);
  params.prefix = view_rows(prefix);
  Tensor out = new_output_like(
      x, {params.masks * params.batch, params.num_prefix + params.kept, params.dim}, type);
  params.out = out.data_ptr();
  check_cuda(cuda::gather_tokens_fwd(params, current_stream(x)));
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor> gather_tokens_bwd(const Tensor& grad_any,
                                                            const Tensor& ids_any, int64_t tokens,
                                                            int64_t num_prefix, bool need_x,
                                                            bool need_pos, bool need_prefix) {
  check_tensor(ids_any, "ids", grad_any, {kAny, kAny, kAny});
  check_dtype(ids_any, "ids", ScalarType::Long);
  check_size(tokens, "tokens", 0);
  check_size(num_prefix, "num_prefix", 0);
  GatherTokensBwdParams params;
  params.masks = ids_any.size(0);
  params.batch = ids_any.size(1);
  params.kept = ids_any.size(2);
  params.tokens = tokens;
  params.num_prefix = num_prefix;
  check_tensor(grad_any, "grad", grad_any,
               {params.masks * params.batch, num_prefix + params.kept, kAny});
  const ScalarType type = grad_any.scalar_type();
  params.dtype = dtype_of(type, "grad", false);
  params.dim = grad_any.size(2);
  const OnDevice guard(grad_any);
  const Tensor grad = rows_of(grad_any);
  const Tensor ids = rows_of(ids_any);
  params.grad = view_rows(grad);
  params.ids = view_ids(ids);
  const auto output = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return new_output_like(grad, needed ? sizes : std::initializer_list<int64_t>{0}, type);
  };
  Tensor dx = output(need_x, {params.batch, tokens, params.dim});
  Tensor dpos = output(need_pos, {tokens, params.dim});
  Tensor dprefix = output(need_prefix, {num_prefix, params.dim});
  params.dx = output_ptr(need_x, dx);
  params.dpos = output_ptr(need_pos, dpos);
  params.dprefix = output_ptr(need_prefix, dprefix);
  // Freed on return, while the kernels may still run: torch's allocator reuses it in stream order.
  const Tensor workspace =
      new_output_like(grad, {cuda::gather_tokens_bwd_workspace(params)}, ScalarType::Float);
  check_cuda(cuda::gather_tokens_bwd(params, static_cast<float*>(workspace.data_ptr()),
                                     current_stream(grad)));
  return {dx, dpos, dprefix};
}

}  // namespace mimkernels::binding

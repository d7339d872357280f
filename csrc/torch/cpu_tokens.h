// Bindings of the token ops: gather_tokens, restore_tokens, fill_mask_tokens.
#pragma once

#include <tuple>

#include "cpu/dispatch.h"
#include "torch/token_args.h"

namespace mimkernels::binding {

inline Tensor gather_tokens_fwd(const Tensor& x, const Tensor& ids, OptionalTensor pos,
                                OptionalTensor prefix) {
  GatherTokensFwdParams params;
  const TokenInputs inputs = set_gather_fwd(params, check_shape, x, ids, pos, prefix);
  Tensor out = new_output(
      {params.masks * params.batch, params.num_prefix + params.kept, params.dim}, x.scalar_type());
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().gather_tokens_fwd(params, &torch_pool), "gather_tokens", "ids",
                  true);
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor> gather_tokens_bwd(const Tensor& grad, const Tensor& ids,
                                                            int64_t tokens, int64_t num_prefix,
                                                            bool need_x, bool need_pos,
                                                            bool need_prefix) {
  GatherTokensBwdParams params;
  const TokenInputs inputs = set_gather_bwd(params, check_shape, grad, ids, tokens, num_prefix);
  const ScalarType type = grad.scalar_type();
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

inline Tensor restore_tokens_fwd(const Tensor& x, const Tensor& ids, const Tensor& token,
                                 OptionalTensor pos, int64_t num_prefix) {
  RestoreTokensFwdParams params;
  const TokenInputs inputs = set_restore_fwd(params, check_shape, x, ids, token, pos, num_prefix);
  Tensor out = new_output({params.batch, num_prefix + params.tokens, params.dim}, x.scalar_type());
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().restore_tokens_fwd(params, &torch_pool), "restore_tokens",
                  "ids_restore", false);
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor> restore_tokens_bwd(const Tensor& grad, const Tensor& ids,
                                                             int64_t kept, int64_t num_prefix,
                                                             bool need_x, bool need_mask_token,
                                                             bool need_pos) {
  RestoreTokensBwdParams params;
  const TokenInputs inputs = set_restore_bwd(params, check_shape, grad, ids, kept, num_prefix);
  const ScalarType type = grad.scalar_type();
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

inline Tensor fill_mask_tokens_fwd(const Tensor& x, const Tensor& mask, const Tensor& token) {
  FillMaskTokensFwdParams params;
  const TokenInputs inputs = set_fill_fwd(params, check_shape, x, mask, token);
  Tensor out = new_output({params.batch, params.tokens, params.dim}, x.scalar_type());
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().fill_mask_tokens_fwd(params, &torch_pool), "fill_mask_tokens", "",
                  false);
  return out;
}

inline std::tuple<Tensor, Tensor> fill_mask_tokens_bwd(const Tensor& grad, const Tensor& mask,
                                                       bool need_x, bool need_mask_token) {
  FillMaskTokensBwdParams params;
  const TokenInputs inputs = set_fill_bwd(params, check_shape, grad, mask);
  const ScalarType type = grad.scalar_type();
  Tensor dx = new_output_if(need_x, {params.batch, params.tokens, params.dim}, type);
  Tensor dmask_token = new_output_if(need_mask_token, {params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dmask_token = output_ptr(need_mask_token, dmask_token);
  raise_if_failed(cpu_kernels().fill_mask_tokens_bwd(params, &torch_pool), "fill_mask_tokens", "",
                  false);
  return {dx, dmask_token};
}

}  // namespace mimkernels::binding

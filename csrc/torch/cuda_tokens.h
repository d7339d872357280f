// Bindings of the token ops on CUDA: gather_tokens, restore_tokens, fill_mask_tokens.
#pragma once

#include <tuple>

#include "ops/fill_mask_tokens/cuda.h"
#include "ops/gather_tokens/cuda.h"
#include "ops/restore_tokens/cuda.h"
#include "torch/cuda_common.h"
#include "torch/token_args.h"

namespace mimkernels::binding {

inline Tensor gather_tokens_fwd(const Tensor& x, const Tensor& ids, OptionalTensor pos,
                                OptionalTensor prefix) {
  GatherTokensFwdParams params;
  const TokenInputs inputs = set_gather_fwd(params, SameDevice{x}, x, ids, pos, prefix);
  check_ids("gather_tokens", "ids", inputs.ids, params.tokens);
  Tensor out =
      new_output_like(x, {params.masks * params.batch, params.num_prefix + params.kept, params.dim},
                      x.scalar_type());
  params.out = out.data_ptr();
  const OnDevice device(x);
  check_cuda(cuda::gather_tokens_fwd(params, current_stream(x)));
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor> gather_tokens_bwd(const Tensor& grad, const Tensor& ids,
                                                            int64_t tokens, int64_t num_prefix,
                                                            bool need_x, bool need_pos,
                                                            bool need_prefix) {
  GatherTokensBwdParams params;
  const TokenInputs inputs =
      set_gather_bwd(params, SameDevice{grad}, grad, ids, tokens, num_prefix);
  check_ids("gather_tokens", "ids", inputs.ids, params.tokens);
  const ScalarType type = grad.scalar_type();
  Tensor dx = new_output_like_if(need_x, grad, {params.batch, tokens, params.dim}, type);
  Tensor dpos = new_output_like_if(need_pos, grad, {tokens, params.dim}, type);
  Tensor dprefix = new_output_like_if(need_prefix, grad, {num_prefix, params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dpos = output_ptr(need_pos, dpos);
  params.dprefix = output_ptr(need_prefix, dprefix);
  const OnDevice device(grad);
  const Tensor workspace = new_workspace(grad, cuda::gather_tokens_bwd_workspace(params));
  check_cuda(cuda::gather_tokens_bwd(params, static_cast<float*>(workspace.data_ptr()),
                                     current_stream(grad)));
  return {dx, dpos, dprefix};
}

inline Tensor restore_tokens_fwd(const Tensor& x, const Tensor& ids, const Tensor& token,
                                 OptionalTensor pos, int64_t num_prefix) {
  RestoreTokensFwdParams params;
  const TokenInputs inputs = set_restore_fwd(params, SameDevice{x}, x, ids, token, pos, num_prefix);
  check_ids("restore_tokens", "ids_restore", inputs.ids, params.tokens);
  Tensor out =
      new_output_like(x, {params.batch, num_prefix + params.tokens, params.dim}, x.scalar_type());
  params.out = out.data_ptr();
  const OnDevice device(x);
  check_cuda(cuda::restore_tokens_fwd(params, current_stream(x)));
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor> restore_tokens_bwd(const Tensor& grad, const Tensor& ids,
                                                             int64_t kept, int64_t num_prefix,
                                                             bool need_x, bool need_mask_token,
                                                             bool need_pos) {
  RestoreTokensBwdParams params;
  const TokenInputs inputs = set_restore_bwd(params, SameDevice{grad}, grad, ids, kept, num_prefix);
  check_ids("restore_tokens", "ids_restore", inputs.ids, params.tokens);
  const ScalarType type = grad.scalar_type();
  Tensor dx = new_output_like_if(need_x, grad, {params.batch, num_prefix + kept, params.dim}, type);
  Tensor dmask_token = new_output_like_if(need_mask_token, grad, {params.dim}, type);
  Tensor dpos = new_output_like_if(need_pos, grad, {num_prefix + params.tokens, params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dmask_token = output_ptr(need_mask_token, dmask_token);
  params.dpos = output_ptr(need_pos, dpos);
  const OnDevice device(grad);
  const Tensor workspace = new_workspace(grad, cuda::restore_tokens_bwd_workspace(params));
  check_cuda(cuda::restore_tokens_bwd(params, static_cast<float*>(workspace.data_ptr()),
                                      current_stream(grad)));
  return {dx, dmask_token, dpos};
}

inline Tensor fill_mask_tokens_fwd(const Tensor& x, const Tensor& mask, const Tensor& token) {
  FillMaskTokensFwdParams params;
  const TokenInputs inputs = set_fill_fwd(params, SameDevice{x}, x, mask, token);
  Tensor out = new_output_like(x, {params.batch, params.tokens, params.dim}, x.scalar_type());
  params.out = out.data_ptr();
  const OnDevice device(x);
  check_cuda(cuda::fill_mask_tokens_fwd(params, current_stream(x)));
  return out;
}

inline std::tuple<Tensor, Tensor> fill_mask_tokens_bwd(const Tensor& grad, const Tensor& mask,
                                                       bool need_x, bool need_mask_token) {
  FillMaskTokensBwdParams params;
  const TokenInputs inputs = set_fill_bwd(params, SameDevice{grad}, grad, mask);
  const ScalarType type = grad.scalar_type();
  Tensor dx = new_output_like_if(need_x, grad, {params.batch, params.tokens, params.dim}, type);
  Tensor dmask_token = new_output_like_if(need_mask_token, grad, {params.dim}, type);
  params.dx = output_ptr(need_x, dx);
  params.dmask_token = output_ptr(need_mask_token, dmask_token);
  const OnDevice device(grad);
  const Tensor workspace = new_workspace(grad, cuda::fill_mask_tokens_bwd_workspace(params));
  check_cuda(cuda::fill_mask_tokens_bwd(params, static_cast<float*>(workspace.data_ptr()),
                                        current_stream(grad)));
  return {dx, dmask_token};
}

}  // namespace mimkernels::binding

// Bindings of bias_gelu on CUDA.
#pragma once

#include <tuple>

#include "ops/bias_gelu/cuda.h"
#include "torch/cuda_common.h"
#include "torch/gelu_args.h"

namespace mimkernels::binding {

inline Tensor bias_gelu_fwd(const Tensor& x, OptionalTensor bias, bool tanh) {
  BiasGeluFwdParams params;
  const GeluInputs inputs = set_gelu(params, SameDevice{x}, x, bias, tanh);
  Tensor out = new_output_like(x, {params.batch, params.tokens, params.dim}, x.scalar_type());
  params.out = out.data_ptr();
  const OnDevice device(x);
  check_cuda(cuda::bias_gelu_fwd(params, current_stream(x)));
  return out;
}

inline std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& grad, const Tensor& x,
                                                OptionalTensor bias, bool tanh, bool need_x,
                                                bool need_bias) {
  BiasGeluBwdParams params;
  const GeluInputs inputs = set_gelu_bwd(params, SameDevice{x}, grad, x, bias, tanh);
  need_bias = need_bias && bias.has_value();
  Tensor dx =
      new_output_like_if(need_x, x, {params.batch, params.tokens, params.dim}, x.scalar_type());
  Tensor dbias = new_output_like_if(need_bias, x, {params.dim}, bias_type(x, bias));
  params.dx = output_ptr(need_x, dx);
  params.dbias = output_ptr(need_bias, dbias);
  const OnDevice device(x);
  const Tensor workspace = new_workspace(x, cuda::bias_gelu_bwd_workspace(params));
  check_cuda(
      cuda::bias_gelu_bwd(params, static_cast<float*>(workspace.data_ptr()), current_stream(x)));
  return {dx, dbias};
}

}  // namespace mimkernels::binding

// Bindings of bias_gelu.
#pragma once

#include <tuple>

#include "cpu/dispatch.h"
#include "torch/gelu_args.h"

namespace mimkernels::binding {

inline Tensor bias_gelu_fwd(const Tensor& x, OptionalTensor bias, bool tanh) {
  BiasGeluFwdParams params;
  const GeluInputs inputs = set_gelu(params, check_shape, x, bias, tanh);
  Tensor out = new_output({params.batch, params.tokens, params.dim}, x.scalar_type());
  params.out = out.data_ptr();
  raise_if_failed(cpu_kernels().bias_gelu_fwd(params, &torch_pool), "bias_gelu", "", false);
  return out;
}

inline std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& grad, const Tensor& x,
                                                OptionalTensor bias, bool tanh, bool need_x,
                                                bool need_bias) {
  BiasGeluBwdParams params;
  const GeluInputs inputs = set_gelu_bwd(params, check_shape, grad, x, bias, tanh);
  need_bias = need_bias && bias.has_value();
  Tensor dx = new_output_if(need_x, {params.batch, params.tokens, params.dim}, x.scalar_type());
  Tensor dbias = new_output_if(need_bias, {params.dim}, bias_type(x, bias));
  params.dx = output_ptr(need_x, dx);
  params.dbias = output_ptr(need_bias, dbias);
  raise_if_failed(cpu_kernels().bias_gelu_bwd(params, &torch_pool), "bias_gelu", "", false);
  return {dx, dbias};
}

}  // namespace mimkernels::binding

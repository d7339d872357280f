// Bindings of bias_gelu, for every device.
#pragma once

#include <tuple>

#include "ops/bias_gelu/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// What forward and backward have in common. The tensors stay alive beside the pointers into them.
template <typename Device>
struct GeluInputs {
  Tensor x;
  OptionalTensor bias;

  template <typename Params>
  GeluInputs(Params& params, const Device& device, const Tensor& x_any,
             const OptionalTensor& bias_any, bool tanh)
      : x(take(device, x_any, "x", {kAnySize, kAnySize, kAnySize})) {
    params.dtype = dtype_of(x, "x");
    params.tanh = tanh;
    params.batch = x.size(0);
    params.tokens = x.size(1);
    params.dim = x.size(2);
    params.x = view_rows(x);
    bias = take(device, bias_any, "bias", {params.dim});
    params.has_bias = bias.has_value();
    if (!params.has_bias) return;
    if (bias_type() != ScalarType::Float) check_dtype(*bias, "bias", x.scalar_type());
    params.bias_dtype = dtype_of(*bias, "bias");
    params.bias = bias->data_ptr();
  }

  // The dtype of dbias; any where there is none.
  ScalarType bias_type() const { return bias.has_value() ? bias->scalar_type() : x.scalar_type(); }
};

template <typename Device>
Tensor bias_gelu_fwd(const Tensor& x_any, OptionalTensor bias_any, bool tanh) {
  const Device device(x_any);
  BiasGeluFwdParams params;
  const GeluInputs<Device> inputs(params, device, x_any, bias_any, tanh);
  Tensor out =
      device.empty({params.batch, params.tokens, params.dim}, inputs.x.scalar_type());  // [A, R, E]
  params.out = out.data_ptr();
  device.run(params);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& grad_any, const Tensor& x_any,
                                         OptionalTensor bias_any, bool tanh, bool need_x,
                                         bool need_bias) {
  const Device device(x_any);
  BiasGeluBwdParams params;
  const GeluInputs<Device> inputs(params, device, x_any, bias_any, tanh);
  const ScalarType type = inputs.x.scalar_type();
  const Tensor grad =
      take(device, grad_any, "grad", {params.batch, params.tokens, params.dim}, type);
  params.grad = view_rows(grad);
  need_bias = need_bias && params.has_bias;
  Tensor dx = empty_if(device, need_x, {params.batch, params.tokens, params.dim}, type);
  Tensor dbias = empty_if(device, need_bias, {params.dim}, inputs.bias_type());
  params.dx = output_ptr(need_x, dx);
  params.dbias = output_ptr(need_bias, dbias);
  device.run(params);
  return {dx, dbias};
}

}  // namespace mimkernels::binding

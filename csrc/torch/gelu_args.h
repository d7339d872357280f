// Arguments of bias_gelu as parameters of its kernels, on the CPU and on CUDA.
// `check(tensor, name, sizes)` refuses other sizes, kAny apart, and other devices.
#pragma once

#include "ops/bias_gelu/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// The tensors whose memory a call reads, alive until it returns.
struct GeluInputs {
  Tensor x;
  OptionalTensor bias;
  OptionalTensor grad;
};

// What forward and backward have in common.
template <typename Params, typename Check>
GeluInputs set_gelu(Params& params, const Check& check, const Tensor& x, const OptionalTensor& bias,
                    bool tanh) {
  check(x, "x", {kAny, kAny, kAny});
  params.dtype = dtype_of(x.scalar_type(), "x", false);
  params.tanh = tanh;
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.dim = x.size(2);
  if (bias.has_value()) {
    check(*bias, "bias", {params.dim});
    if (bias->scalar_type() != ScalarType::Float) check_dtype(*bias, "bias", x.scalar_type());
    params.bias_dtype = dtype_of(bias->scalar_type(), "bias", false);
  }
  GeluInputs inputs = {rows_of(x), rows_of(bias), std::nullopt};
  params.x = view_rows(inputs.x);
  params.has_bias = inputs.bias.has_value();
  if (params.has_bias) params.bias = inputs.bias->data_ptr();
  return inputs;
}

template <typename Check>
GeluInputs set_gelu_bwd(BiasGeluBwdParams& params, const Check& check, const Tensor& grad,
                        const Tensor& x, const OptionalTensor& bias, bool tanh) {
  GeluInputs inputs = set_gelu(params, check, x, bias, tanh);
  check(grad, "grad", {params.batch, params.tokens, params.dim});
  check_dtype(grad, "grad", x.scalar_type());
  inputs.grad = rows_of(grad);
  params.grad = view_rows(*inputs.grad);
  return inputs;
}

// The dtype of dbias; any where there is none.
inline ScalarType bias_type(const Tensor& x, const OptionalTensor& bias) {
  return bias.has_value() ? bias->scalar_type() : x.scalar_type();
}

}  // namespace mimkernels::binding

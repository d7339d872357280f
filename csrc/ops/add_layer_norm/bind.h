// Bindings of add_layer_norm, for every device.
#pragma once

#include <optional>
#include <tuple>

#include "ops/add_layer_norm/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// An optional vector of fp32, contiguous, and whether it was given. The tensor stays alive beside
// the pointer into it.
template <typename Device>
OptionalTensor take_floats(bool& given, const float*& data, const Device& device,
                           const OptionalTensor& tensor, const char* name, int64_t size) {
  OptionalTensor vector = take(device, tensor, name, {size}, ScalarType::Float);
  given = vector.has_value();
  data = given ? floats(*vector) : nullptr;
  return vector;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(
    const Tensor& x_any, OptionalTensor y_any, OptionalTensor weight_any, OptionalTensor bias_any,
    OptionalTensor scale_any, OptionalTensor drop_any, double eps, ScalarType out_type) {
  const Device device(x_any);
  AddLayerNormFwdParams params;
  const Tensor x = take(device, x_any, "x", {kAnySize, kAnySize, kAnySize});
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.dim = x.size(2);
  params.eps = static_cast<float>(eps);
  params.residual_dtype = dtype_of(x, "x");
  params.out_dtype = dtype_of(out_type, "the output");
  params.x = view_rows(x);
  const OptionalTensor y = take(device, y_any, "y", {params.batch, params.tokens, params.dim});
  params.y = view_rows(y);
  if (y.has_value()) {
    params.y_dtype = dtype_of(*y, "y");
    require(params.y_dtype == params.residual_dtype || params.residual_dtype == DType::kFloat32,
            "x has the dtype of x + y");
  } else {
    require(!scale_any.has_value() && !drop_any.has_value(), "scale and drop come with y");
  }
  const int64_t dim = params.dim;
  const auto weight =
      take_floats(params.has_weight, params.weight, device, weight_any, "weight", dim);
  const auto bias = take_floats(params.has_bias, params.bias, device, bias_any, "bias", dim);
  const auto scale = take_floats(params.has_scale, params.scale, device, scale_any, "scale", dim);
  const auto drop =
      take_floats(params.has_drop, params.drop, device, drop_any, "drop", params.batch);
  Tensor residual = empty_if(device, params.y.given, {params.batch, params.tokens, dim},
                             x.scalar_type());                                   // [A, R, C]
  Tensor out = device.empty({params.batch, params.tokens, dim}, out_type);       // [A, R, C]
  Tensor mean = device.empty({params.batch, params.tokens}, ScalarType::Float);  // [A, R]
  Tensor rstd = device.empty({params.batch, params.tokens}, ScalarType::Float);  // [A, R]
  params.residual = output_ptr(params.y.given, residual);
  params.out = out.data_ptr();
  params.mean = floats(mean);
  params.rstd = floats(rstd);
  device.run(params);
  return {residual, out, mean, rstd};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    OptionalTensor grad_residual_any, OptionalTensor grad_out_any, const Tensor& residual_any,
    OptionalTensor y_any, OptionalTensor weight_any, OptionalTensor scale_any,
    OptionalTensor drop_any, const Tensor& mean_any, const Tensor& rstd_any, ScalarType y_type,
    bool need_x, bool need_y, bool need_weight, bool need_bias, bool need_scale) {
  const Device device(residual_any);
  AddLayerNormBwdParams params;
  const Tensor residual = take(device, residual_any, "residual", {kAnySize, kAnySize, kAnySize});
  const ScalarType type = residual.scalar_type();
  const int64_t batch = params.batch = residual.size(0);
  const int64_t tokens = params.tokens = residual.size(1);
  const int64_t dim = params.dim = residual.size(2);
  params.residual_dtype = dtype_of(residual, "residual");
  params.y_dtype = dtype_of(y_type, "y");
  params.residual = view_rows(residual);
  const OptionalTensor grad_residual =
      take(device, grad_residual_any, "dresidual", {batch, tokens, dim}, type);
  params.grad_residual = view_rows(grad_residual);
  const OptionalTensor grad_out = take(device, grad_out_any, "dnormalised", {batch, tokens, dim});
  params.grad_out = view_rows(grad_out);
  if (grad_out.has_value()) params.out_dtype = dtype_of(*grad_out, "dnormalised");
  require(grad_out.has_value() || !(need_weight || need_bias),
          "the gradients of weight and bias come from that of the normalised rows");
  const OptionalTensor y = take(device, y_any, "y", {batch, tokens, dim}, y_type);
  params.y = view_rows(y);
  require(y.has_value() || !need_scale, "the gradient of scale needs y");
  const auto weight =
      take_floats(params.has_weight, params.weight, device, weight_any, "weight", dim);
  const auto scale = take_floats(params.has_scale, params.scale, device, scale_any, "scale", dim);
  const auto drop = take_floats(params.has_drop, params.drop, device, drop_any, "drop", batch);
  const Tensor mean = take_contiguous(device, mean_any, "mean", {batch, tokens}, ScalarType::Float);
  const Tensor rstd = take_contiguous(device, rstd_any, "rstd", {batch, tokens}, ScalarType::Float);
  params.mean = floats(mean);
  params.rstd = floats(rstd);
  Tensor dx = empty_if(device, need_x, {batch, tokens, dim}, type);
  Tensor dy = empty_if(device, need_y, {batch, tokens, dim}, y_type);
  Tensor dweight = empty_if(device, need_weight, {dim}, ScalarType::Float);
  Tensor dbias = empty_if(device, need_bias, {dim}, ScalarType::Float);
  Tensor dscale = empty_if(device, need_scale, {dim}, ScalarType::Float);
  params.dx = output_ptr(need_x, dx);
  params.dy = output_ptr(need_y, dy);
  params.dweight = static_cast<float*>(output_ptr(need_weight, dweight));
  params.dbias = static_cast<float*>(output_ptr(need_bias, dbias));
  params.dscale = static_cast<float*>(output_ptr(need_scale, dscale));
  device.run(params);
  return {dx, dy, dweight, dbias, dscale};
}

}  // namespace mimkernels::binding

// Bindings of masked_feature_loss, for every device.
#pragma once

#include "ops/masked_feature_loss/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// What forward and backward have in common. The tensors stay alive beside the pointers into them.
template <typename Device>
struct FeatureLossInputs {
  Tensor pred;
  Tensor target;
  OptionalTensor ids;

  FeatureLossInputs(MaskedFeatureLossParams& params, Device& device, const Tensor& pred_any,
                    const Tensor& target_any, const OptionalTensor& ids_any, bool layer_norm,
                    double eps, int64_t kind, double beta, bool mean)
      : pred(take(device, pred_any, "pred", {kAnySize, kAnySize, kAnySize})),
        target(take(device, target_any, "target", {kAnySize, kAnySize, pred.size(2)})) {
    require(kind >= 0 && kind <= 3, "kind is 0, 1, 2 or 3");
    params.dtype = dtype_of(pred, "pred");
    params.target_dtype = dtype_of(target, "target");
    params.batch = pred.size(0);
    params.length = pred.size(1);
    params.images = target.size(0);
    params.tokens = target.size(1);
    params.dim = pred.size(2);
    params.pred = view_rows(pred);
    params.target = view_rows(target);
    const bool per_image = params.batch == params.images;
    ids = take(device, ids_any, "ids", {params.batch, params.length}, ScalarType::Long);
    if (ids.has_value()) {
      require(per_image || params.batch == 1, "pred has the images of target, or one of its own");
      const int64_t tokens = per_image ? params.tokens : params.images * params.tokens;
      device.check_ids(Device::kOp, "ids", *ids, tokens, false);
      params.ids = view_ids(*ids);
    } else {
      require(per_image && params.length == params.tokens, "without ids, pred has all tokens");
    }
    params.layer_norm = layer_norm;
    params.eps = static_cast<float>(eps);
    params.beta = static_cast<float>(beta);
    // Of so small a beta nothing is left of the square, and 1 / beta may be beyond fp32.
    const bool is_l1 = kind == 2 && params.beta < 1e-30f;
    params.kind = is_l1 ? FeatureLossKind::kL1 : static_cast<FeatureLossKind>(kind);
    params.mean = mean;
  }
};

template <typename Device>
Tensor masked_feature_loss_fwd(const Tensor& pred, const Tensor& target, OptionalTensor ids,
                               bool layer_norm, double eps, int64_t kind, double beta, bool mean) {
  Device device(pred);
  MaskedFeatureLossParams params;
  const FeatureLossInputs<Device> inputs(params, device, pred, target, ids, layer_norm, eps, kind,
                                         beta, mean);
  Tensor loss = mean ? device.empty({}, ScalarType::Float)
                     : device.empty({params.batch, params.length}, ScalarType::Float);
  params.loss = floats(loss);
  device.run(params);
  return loss;
}

template <typename Device>
Tensor masked_feature_loss_bwd(const Tensor& grad, const Tensor& pred, const Tensor& target,
                               OptionalTensor ids, bool layer_norm, double eps, int64_t kind,
                               double beta, bool mean) {
  Device device(pred);
  MaskedFeatureLossParams params;
  const FeatureLossInputs<Device> inputs(params, device, pred, target, ids, layer_norm, eps, kind,
                                         beta, mean);
  // One number for the mean, else one per row, by stride.
  if (mean) {
    check(device, grad, "grad", {}, ScalarType::Float);
  } else {
    check(device, grad, "grad", {params.batch, params.length}, ScalarType::Float);
    params.grad_strides[0] = grad.stride(0);
    params.grad_strides[1] = grad.stride(1);
  }
  params.grad = floats(grad);
  Tensor dpred = device.empty({params.batch, params.length, params.dim}, inputs.pred.scalar_type());
  params.dpred = dpred.data_ptr();
  device.run(params);
  return dpred;
}

}  // namespace mimkernels::binding

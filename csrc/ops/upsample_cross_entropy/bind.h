// Bindings of upsample_cross_entropy, for every device.
#pragma once

#include <tuple>

#include "ops/upsample_cross_entropy/params.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// What forward and backward have in common. The tensors stay alive beside the pointers into them.
template <typename Device>
struct UpsampledInputs {
  Tensor logits;
  Tensor labels;
  OptionalTensor weight;

  UpsampledInputs(UpsampleCrossEntropyParams& params, Device& device, const Tensor& logits_any,
                  const Tensor& labels_any, const OptionalTensor& weight_any, int64_t ignore_index,
                  bool align_corners, double smoothing)
      : logits(take(device, logits_any, "logits", {kAnySize, kAnySize, kAnySize, kAnySize})),
        labels(take(device, labels_any, "labels", {logits.size(0), kAnySize, kAnySize},
                    ScalarType::Long)) {
    params.dtype = dtype_of(logits, "logits");
    params.batch = logits.size(0);
    params.classes = logits.size(1);
    params.source_h = logits.size(2);
    params.source_w = logits.size(3);
    require(params.classes > 0 && params.source_h > 0 && params.source_w > 0,
            "logits have a class, a row and a column");
    params.logits = logits.data_ptr();
    for (int d = 0; d < 3; ++d) params.logits_strides[d] = logits.stride(d);
    params.height = labels.size(1);
    params.width = labels.size(2);
    params.labels = static_cast<const int64_t*>(labels.data_ptr());
    for (int d = 0; d < 2; ++d) params.labels_strides[d] = labels.stride(d);
    device.check_ids(Device::kOp, "labels", labels, params.classes, true, ignore_index);
    if (weight_any.has_value()) {
      weight = take_contiguous(device, *weight_any, "weight", {params.classes}, ScalarType::Float);
      params.has_weight = true;
      params.weight = floats(*weight);
    }
    params.ignore_index = ignore_index;
    params.align_corners = align_corners;
    params.smoothing = static_cast<float>(smoothing);
  }
};

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_fwd(
    const Tensor& logits, const Tensor& labels, OptionalTensor weight, int64_t ignore_index,
    bool align_corners, double smoothing) {
  Device device(logits);
  UpsampleCrossEntropyParams params;
  const UpsampledInputs<Device> inputs(params, device, logits, labels, weight, ignore_index,
                                       align_corners, smoothing);
  Tensor loss = device.empty({}, ScalarType::Float);
  Tensor statistics =
      device.empty({2, params.batch, params.height, params.width}, ScalarType::Float);
  Tensor totals = device.empty({2}, ScalarType::Float);
  params.loss = floats(loss);
  params.statistics = floats(statistics);
  params.totals = floats(totals);
  device.run(params);
  return {loss, statistics, totals};
}

template <typename Device>
Tensor upsample_cross_entropy_bwd(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                                  const Tensor& statistics_any, const Tensor& totals_any,
                                  OptionalTensor weight, int64_t ignore_index, bool align_corners,
                                  double smoothing) {
  Device device(logits);
  UpsampleCrossEntropyParams params;
  const UpsampledInputs<Device> inputs(params, device, logits, labels, weight, ignore_index,
                                       align_corners, smoothing);
  check(device, grad, "grad", {}, ScalarType::Float);
  const Tensor statistics =
      take_contiguous(device, statistics_any, "statistics",
                      {2, params.batch, params.height, params.width}, ScalarType::Float);
  const Tensor totals = take_contiguous(device, totals_any, "totals", {2}, ScalarType::Float);
  params.grad = floats(grad);
  params.statistics = floats(statistics);
  params.totals = floats(totals);
  Tensor dlogits = device.empty({params.batch, params.classes, params.source_h, params.source_w},
                                inputs.logits.scalar_type());
  params.dlogits = dlogits.data_ptr();
  device.run(params);
  return dlogits;
}

}  // namespace mimkernels::binding

// The scores of attention and of its companions as parameters of kernels.
#pragma once

#include "core/attention.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// [B, H, N, D], as q, k and v come.
inline HeadRows view_heads(const Tensor& tensor) {
  HeadRows rows;
  rows.data = tensor.data_ptr();
  rows.stride_batch = tensor.stride(0);
  rows.stride_head = tensor.stride(1);
  rows.stride_token = tensor.stride(2);
  return rows;
}

// What every call takes. The tensors stay alive beside the pointers into them.
template <typename Device>
struct ScoreInputs {
  const Device& device;
  Tensor q;
  Tensor k;
  OptionalTensor bias;
  OptionalTensor bias_table;
  OptionalTensor bias_index;
  OptionalTensor key_mask;
  OptionalTensor logit_scale;
  AttentionScores scores;

  ScoreInputs(Device& device, const Tensor& q_any, const Tensor& k_any,
              const OptionalTensor& bias_any, const OptionalTensor& bias_table_any,
              const OptionalTensor& bias_index_any, const OptionalTensor& key_mask_any,
              const OptionalTensor& logit_scale_any, double scale)
      : device(device),
        q(take(device, q_any, "q", {kAnySize, kAnySize, kAnySize, kAnySize})),
        k(take(device, k_any, "k", {q.size(0), q.size(1), kAnySize, q.size(3)}, type())) {
    scores.dtype = dtype_of(q, "q");
    scores.batch = q.size(0);
    scores.heads = q.size(1);
    scores.queries = q.size(2);
    scores.keys = k.size(2);
    scores.dim = q.size(3);
    require(scores.dim > 0 && scores.dim <= 128 && scores.dim % 8 == 0,
            "the head dim is a multiple of 8 up to 128");
    scores.scale = static_cast<float>(scale);
    scores.q = view_heads(q);
    scores.k = view_heads(k);
    take_bias(bias_any);
    take_table(device, bias_table_any, bias_index_any);
    key_mask =
        take(device, key_mask_any, "key_mask", {scores.batch, scores.keys}, ScalarType::Bool);
    scores.key_mask = view_mask(key_mask);
    take_cosine(logit_scale_any);
  }

  ScalarType type() const { return q.scalar_type(); }

  // [B, H, Nq].
  Tensor take_lse(const Tensor& lse, const char* name) const {
    return take_contiguous(device, lse, name, {scores.batch, scores.heads, scores.queries},
                           ScalarType::Float);
  }

 private:
  // [W, H or 1, Nq, Nk], fp32 or of the type of q.
  void take_bias(const OptionalTensor& bias_any) {
    bias = take(device, bias_any, "bias", {kAnySize, kAnySize, scores.queries, scores.keys});
    if (!bias.has_value()) return;
    if (bias->scalar_type() != ScalarType::Float) check_dtype(*bias, "bias", type());
    const int64_t windows = bias->size(0);
    require(windows == 1 || windows == scores.batch || (windows > 0 && scores.batch % windows == 0),
            "the windows of bias divide the images");
    require(bias->size(1) == 1 || bias->size(1) == scores.heads, "bias of 1 head or of all");
    ScoreBias& view = scores.bias;
    view.data = bias->data_ptr();
    view.given = true;
    view.dtype = dtype_of(*bias, "bias");
    view.windows = windows;
    view.heads = bias->size(1);
    view.stride_batch = view.windows == 1 ? 0 : bias->stride(0);
    view.stride_head = view.heads == 1 ? 0 : bias->stride(1);
    view.stride_query = bias->stride(2);
  }

  // [T, H], fp32 or of the type of q, and int64 [Nq, Nk].
  void take_table(Device& device, const OptionalTensor& table_any,
                  const OptionalTensor& index_any) {
    require(table_any.has_value() == index_any.has_value(), "bias_table comes with bias_index");
    if (!table_any.has_value()) return;
    bias_table = take(device, table_any, "bias_table", {kAnySize, scores.heads});
    if (bias_table->scalar_type() != ScalarType::Float) {
      check_dtype(*bias_table, "bias_table", type());
    }
    bias_index =
        take(device, index_any, "bias_index", {scores.queries, scores.keys}, ScalarType::Long);
    ScoreTable& view = scores.table;
    view.data = bias_table->data_ptr();
    view.given = true;
    view.dtype = dtype_of(*bias_table, "bias_table");
    view.entries = bias_table->size(0);
    view.stride_entry = bias_table->stride(0);
    view.index = view_ids(*bias_index);
    device.check_ids(Device::kOp, "bias_index", *bias_index, view.entries, false);
  }

  // fp32 [H].
  void take_cosine(const OptionalTensor& logit_scale_any) {
    if (!logit_scale_any.has_value()) return;
    logit_scale =
        take_contiguous(device, *logit_scale_any, "logit_scale", {scores.heads}, ScalarType::Float);
    scores.cosine.given = true;
    scores.cosine.logit_scale = floats(*logit_scale);
  }
};

}  // namespace mimkernels::binding

// Bindings of attention and of its companions that need no N x N memory.
#pragma once

#include <tuple>

#include "../core/attention.h"
#include "../cpu/dispatch.h"
#include "tensor_args.h"

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

// [B, N, H, D], as out and its gradient come.
inline HeadRows view_tokens(const Tensor& tensor) {
  HeadRows rows;
  rows.data = tensor.data_ptr();
  rows.stride_batch = tensor.stride(0);
  rows.stride_head = tensor.stride(2);
  rows.stride_token = tensor.stride(1);
  return rows;
}

inline OptionalTensor checked_bias(const OptionalTensor& bias, const AttentionScores& s,
                                   ScalarType type) {
  if (!bias.has_value()) return bias;
  check_shape(*bias, "bias", {kAny, kAny, s.queries, s.keys});
  const bool good = (bias->size(0) == 1 || bias->size(0) == s.batch) &&
                    (bias->size(1) == 1 || bias->size(1) == s.heads);
  check_argument(good, "bias has shape " + shape_text(bias->sizes().data(), bias->sizes().size()) +
                           ", expected [1 or " + std::to_string(s.batch) + ", 1 or " +
                           std::to_string(s.heads) + ", ...]");
  if (bias->scalar_type() != ScalarType::Float) check_dtype(*bias, "bias", type);
  return rows_of(bias);
}

inline ScoreBias view_bias(const OptionalTensor& bias) {
  ScoreBias view;
  if (!bias.has_value()) return view;
  view.data = bias->data_ptr();
  view.dtype = dtype_of(bias->scalar_type(), "bias", false);
  view.batch = bias->size(0);
  view.heads = bias->size(1);
  view.stride_batch = view.batch == 1 ? 0 : bias->stride(0);
  view.stride_head = view.heads == 1 ? 0 : bias->stride(1);
  view.stride_query = bias->stride(2);
  return view;
}

// Tensors that the parameters point into, kept alive together.
struct ScoreTensors {
  Tensor q;
  Tensor k;
  OptionalTensor bias;
  OptionalTensor key_mask;
  AttentionScores scores;

  ScoreTensors(const Tensor& q_any, const Tensor& k_any, const OptionalTensor& bias_any,
               const OptionalTensor& key_mask_any, double scale)
      : q(rows_of(q_any)), k(rows_of(k_any)), key_mask(rows_of(key_mask_any)) {
    check_shape(q, "q", {kAny, kAny, kAny, kAny});
    scores.dtype = dtype_of(q.scalar_type(), "q", false);
    scores.batch = q.size(0);
    scores.heads = q.size(1);
    scores.queries = q.size(2);
    scores.dim = q.size(3);
    check_argument(scores.dim > 0 && scores.dim <= 128 && scores.dim % 8 == 0,
                   "the head dim is " + std::to_string(scores.dim) +
                       ", the cpu backend takes multiples of 8 up to 128");
    check_shape(k, "k", {scores.batch, scores.heads, kAny, scores.dim});
    check_dtype(k, "k", q.scalar_type());
    scores.keys = k.size(2);
    scores.scale = static_cast<float>(scale);
    scores.q = view_heads(q);
    scores.k = view_heads(k);
    bias = checked_bias(bias_any, scores, q.scalar_type());
    scores.bias = view_bias(bias);
    if (key_mask.has_value()) {
      check_shape(*key_mask, "key_mask", {scores.batch, scores.keys});
      check_dtype(*key_mask, "key_mask", ScalarType::Bool);
      scores.key_mask.data = static_cast<const uint8_t*>(key_mask->data_ptr());
      scores.key_mask.stride0 = key_mask->stride(0);
    }
  }
};

inline Tensor checked_values(const Tensor& v, const AttentionScores& s, ScalarType type) {
  check_shape(v, "v", {s.batch, s.heads, s.keys, s.dim});
  check_dtype(v, "v", type);
  return rows_of(v);
}

inline Tensor checked_lse(const Tensor& lse, const AttentionScores& s) {
  check_shape(lse, "lse", {s.batch, s.heads, s.queries});
  check_dtype(lse, "lse", ScalarType::Float);
  return torch::stable::contiguous(lse);
}

// With rows for all tokens, or for those after the prefix alone.
inline OptionalTensor checked_positions(const OptionalTensor& positions, const AttentionScores& s,
                                        int64_t num_prefix) {
  check_argument(num_prefix >= 0 && num_prefix <= s.keys,
                 "num_prefix is " + std::to_string(num_prefix) + " but there are " +
                     std::to_string(s.keys) + " keys");
  if (!positions.has_value()) return positions;
  const int64_t rank = positions->dim();
  const bool patches_alone = rank >= 2 && positions->size(rank - 2) == s.keys - num_prefix;
  const int64_t tokens = patches_alone ? s.keys - num_prefix : s.keys;
  if (rank == 2) {
    check_shape(*positions, "positions", {tokens, kAny});
  } else {
    check_shape(*positions, "positions", {kAny, tokens, kAny});
  }
  check_dtype(*positions, "positions", ScalarType::Float);
  check_argument(s.queries == s.keys, "positions need as many queries as keys, got " +
                                          std::to_string(s.queries) + " and " +
                                          std::to_string(s.keys));
  check_argument((rank == 2 || positions->size(0) == 1 || positions->size(0) == s.batch) &&
                     positions->size(rank - 1) >= 1 && positions->size(rank - 1) <= 3,
                 "positions have shape " + shape_text(positions->sizes().data(), rank) +
                     ", expected [1 or " + std::to_string(s.batch) + ", " + std::to_string(tokens) +
                     ", 1 to 3]");
  return rows_of(positions);
}

inline Positions view_positions(const OptionalTensor& positions, const AttentionScores& s) {
  Positions view;
  if (!positions.has_value()) return view;
  const int64_t rank = positions->dim();
  view.first = s.keys - positions->size(rank - 2);
  view.data = static_cast<const float*>(positions->data_ptr());
  view.stride_batch = rank == 2 || positions->size(0) == 1 ? 0 : positions->stride(0);
  view.stride_token = positions->stride(rank - 2);
  view.dims = static_cast<int>(positions->size(rank - 1));
  return view;
}

// The statistics that `stats` has bits for.
inline int64_t count_planes(int64_t stats) {
  check_argument(stats >= 0 && stats <= kAllStats, "stats is " + std::to_string(stats) +
                                                       ", expected bits below " +
                                                       std::to_string(kAllStats + 1));
  return __builtin_popcountll(static_cast<uint64_t>(stats));
}

inline std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, OptionalTensor bias_any,
    OptionalTensor key_mask_any, double scale, int64_t num_prefix, OptionalTensor positions_any,
    int64_t stats) {
  const ScoreTensors tensors(q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const ScalarType type = tensors.q.scalar_type();
  const Tensor v = checked_values(v_any, s, type);
  const OptionalTensor positions = checked_positions(positions_any, s, num_prefix);
  check_argument((stats & kDistance) == 0 || positions.has_value(), "distance needs positions");
  check_argument((stats & kSelfMass) == 0 || s.queries == s.keys,
                 "self_mass needs as many queries as keys, got " + std::to_string(s.queries) +
                     " and " + std::to_string(s.keys));
  AttentionFwdParams params;
  params.scores = s;
  params.v = view_heads(v);
  params.num_prefix = num_prefix;
  params.positions = view_positions(positions, s);
  params.stats = stats;
  const int64_t planes = count_planes(stats);
  Tensor out = new_output({s.batch, s.queries, s.heads, s.dim}, type);
  Tensor lse = new_output({s.batch, s.heads, s.queries}, ScalarType::Float);
  Tensor rows = new_output({planes, s.batch, s.heads, s.queries}, ScalarType::Float);
  params.out = out.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());
  params.rows = static_cast<float*>(rows.data_ptr());
  raise_if_failed(cpu_kernels().attention_fwd(params, &torch_pool), "attention", "", false);
  return {out, lse, rows};
}

inline Tensor attention_coef(const Tensor& lse_any, OptionalTensor dlse_any, const Tensor& rows_any,
                             OptionalTensor drows_any, int64_t stats) {
  check_shape(lse_any, "lse", {kAny, kAny, kAny});
  const int64_t batch = lse_any.size(0), heads = lse_any.size(1), queries = lse_any.size(2);
  const int64_t planes = count_planes(stats);
  check_argument((stats & kPatchEntropy) == 0 || (stats & kPatchMass) != 0,
                 "the gradient of patch_entropy needs patch_mass");
  // Contiguous fp32; `tensor` keeps a copy alive.
  const auto numbers = [](Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    check_shape(tensor, name, sizes);
    check_dtype(tensor, name, ScalarType::Float);
    tensor = torch::stable::contiguous(tensor);
    return static_cast<const float*>(tensor.data_ptr());
  };
  Tensor lse = lse_any;
  Tensor rows = rows_any;
  AttentionCoefParams params;
  params.count = batch * heads * queries;
  params.stats = stats;
  params.lse = numbers(lse, "lse", {batch, heads, queries});
  params.rows = numbers(rows, "rows", {planes, batch, heads, queries});
  if (dlse_any.has_value()) params.dlse = numbers(*dlse_any, "dlse", {batch, heads, queries});
  if (drows_any.has_value()) {
    params.drows = numbers(*drows_any, "drows", {planes, batch, heads, queries});
  }
  Tensor coef = new_output({6, batch, heads, queries}, ScalarType::Float);
  params.coef = static_cast<float*>(coef.data_ptr());
  raise_if_failed(cpu_kernels().attention_coef(params, &torch_pool), "attention", "", false);
  return coef;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const Tensor& out_any, const Tensor& lse_any, OptionalTensor bias_any,
    OptionalTensor key_mask_any, double scale, int64_t num_prefix, OptionalTensor positions_any,
    OptionalTensor coef_any, bool need_bias) {
  const ScoreTensors tensors(q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const ScalarType type = tensors.q.scalar_type();
  const Tensor v = checked_values(v_any, s, type);
  check_shape(out_any, "out", {s.batch, s.queries, s.heads, s.dim});
  check_dtype(out_any, "out", type);
  check_shape(dout_any, "dout", {s.batch, s.queries, s.heads, s.dim});
  check_dtype(dout_any, "dout", type);
  const Tensor out = rows_of(out_any);
  const Tensor dout = rows_of(dout_any);
  const Tensor lse = checked_lse(lse_any, s);
  const OptionalTensor positions = checked_positions(positions_any, s, num_prefix);
  OptionalTensor coef;
  if (coef_any.has_value()) {
    check_shape(*coef_any, "coef", {6, s.batch, s.heads, s.queries});
    check_dtype(*coef_any, "coef", ScalarType::Float);
    coef = torch::stable::contiguous(*coef_any);
  }
  check_argument(!need_bias || tensors.bias.has_value(), "need_bias without a bias");
  AttentionBwdParams params;
  params.scores = s;
  params.v = view_heads(v);
  params.out = view_tokens(out);
  params.dout = view_tokens(dout);
  params.num_prefix = num_prefix;
  params.positions = view_positions(positions, s);
  params.lse = static_cast<const float*>(lse.data_ptr());
  if (coef.has_value()) params.coef = static_cast<const float*>(coef->data_ptr());
  Tensor dq = new_output({s.batch, s.queries, s.heads, s.dim}, type);
  Tensor dk = new_output({s.batch, s.keys, s.heads, s.dim}, type);
  Tensor dv = new_output({s.batch, s.keys, s.heads, s.dim}, type);
  Tensor dbias = need_bias ? new_output({s.bias.batch, s.bias.heads, s.queries, s.keys},
                                        tensors.bias->scalar_type())
                           : new_output({0}, type);
  params.dq = dq.data_ptr();
  params.dk = dk.data_ptr();
  params.dv = dv.data_ptr();
  params.dbias = output_ptr(need_bias, dbias);
  raise_if_failed(cpu_kernels().attention_bwd(params, &torch_pool), "attention", "", false);
  return {dq, dk, dv, dbias};
}

inline Tensor received_attention_fwd(const Tensor& q_any, const Tensor& k_any,
                                     const Tensor& lse_any, OptionalTensor bias_any,
                                     OptionalTensor key_mask_any, double scale) {
  const ScoreTensors tensors(q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const Tensor lse = checked_lse(lse_any, s);
  Tensor out = new_output({s.batch, s.heads, s.keys}, ScalarType::Float);
  ReceivedAttentionParams params;
  params.scores = s;
  params.lse = static_cast<const float*>(lse.data_ptr());
  params.out = static_cast<float*>(out.data_ptr());
  raise_if_failed(cpu_kernels().received_attention_fwd(params, &torch_pool), "received_attention",
                  "", false);
  return out;
}

inline Tensor head_divergence_fwd(const Tensor& q_any, const Tensor& k_any, const Tensor& lse_any,
                                  OptionalTensor bias_any, OptionalTensor key_mask_any,
                                  double scale) {
  const ScoreTensors tensors(q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const Tensor lse = checked_lse(lse_any, s);
  Tensor out = new_output({s.batch, s.heads, s.heads}, ScalarType::Float);
  HeadDivergenceParams params;
  params.scores = s;
  params.lse = static_cast<const float*>(lse.data_ptr());
  params.out = static_cast<float*>(out.data_ptr());
  raise_if_failed(cpu_kernels().head_divergence_fwd(params, &torch_pool), "head_divergence", "",
                  false);
  return out;
}

}  // namespace mimkernels::binding

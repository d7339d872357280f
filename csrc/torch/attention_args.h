// Arguments of attention and of its companions, checked and made into the kernels' parameters, with
// the outputs; the same for every library.
//
// A Place says where the tensors of a call must be and where outputs are made:
//   void check(const Tensor&, const char* name, std::initializer_list<int64_t> sizes) const;
//   Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) const;
//   static constexpr const char* kBackend;
#pragma once

#include <tuple>

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

// [B, N, H, D], as out and its gradient come.
inline HeadRows view_tokens(const Tensor& tensor) {
  HeadRows rows;
  rows.data = tensor.data_ptr();
  rows.stride_batch = tensor.stride(0);
  rows.stride_head = tensor.stride(2);
  rows.stride_token = tensor.stride(1);
  return rows;
}

inline ScoreBias view_bias(const OptionalTensor& bias) {
  ScoreBias view;
  if (!bias.has_value()) return view;
  view.data = bias->data_ptr();
  view.given = true;
  view.dtype = dtype_of(bias->scalar_type(), "bias", false);
  view.batch = bias->size(0);
  view.heads = bias->size(1);
  view.stride_batch = view.batch == 1 ? 0 : bias->stride(0);
  view.stride_head = view.heads == 1 ? 0 : bias->stride(1);
  view.stride_query = bias->stride(2);
  return view;
}

inline Positions view_positions(const OptionalTensor& positions, int64_t tokens) {
  Positions view;
  if (!positions.has_value()) return view;
  const int64_t rank = positions->dim();
  view.data = static_cast<const float*>(positions->data_ptr());
  view.given = true;
  view.first = tokens - positions->size(rank - 2);
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

// What every call takes: tensors that the parameters point into, kept alive together.
template <typename Place>
struct ScoreTensors {
  const Place& place;
  Tensor q;
  Tensor k;
  OptionalTensor bias;
  OptionalTensor key_mask;
  AttentionScores scores;

  ScoreTensors(const Place& place, const Tensor& q_any, const Tensor& k_any,
               const OptionalTensor& bias_any, const OptionalTensor& key_mask_any, double scale)
      : place(place), q(rows_of(q_any)), k(rows_of(k_any)), key_mask(rows_of(key_mask_any)) {
    place.check(q, "q", {kAny, kAny, kAny, kAny});
    scores.dtype = dtype_of(q.scalar_type(), "q", false);
    scores.batch = q.size(0);
    scores.heads = q.size(1);
    scores.queries = q.size(2);
    scores.dim = q.size(3);
    check_argument(scores.dim > 0 && scores.dim <= 128 && scores.dim % 8 == 0,
                   "the head dim is " + std::to_string(scores.dim) + ", the " + Place::kBackend +
                       " backend takes multiples of 8 up to 128");
    place.check(k, "k", {scores.batch, scores.heads, kAny, scores.dim});
    check_dtype(k, "k", q.scalar_type());
    scores.keys = k.size(2);
    scores.scale = static_cast<float>(scale);
    scores.q = view_heads(q);
    scores.k = view_heads(k);
    bias = checked_bias(bias_any);
    scores.bias = view_bias(bias);
    if (key_mask.has_value()) {
      place.check(*key_mask, "key_mask", {scores.batch, scores.keys});
      check_dtype(*key_mask, "key_mask", ScalarType::Bool);
      scores.key_mask = view_mask(*key_mask);
    }
  }

  ScalarType type() const { return q.scalar_type(); }

  Tensor checked_values(const Tensor& v) const {
    place.check(v, "v", {scores.batch, scores.heads, scores.keys, scores.dim});
    check_dtype(v, "v", type());
    return rows_of(v);
  }

  Tensor checked_lse(const Tensor& lse, const char* name) const {
    place.check(lse, name, {scores.batch, scores.heads, scores.queries});
    check_dtype(lse, name, ScalarType::Float);
    return torch::stable::contiguous(lse);
  }

  // With rows for all tokens, or for those after the prefix alone.
  OptionalTensor checked_positions(const OptionalTensor& positions, int64_t num_prefix) const {
    check_argument(num_prefix >= 0 && num_prefix <= scores.keys,
                   "num_prefix is " + std::to_string(num_prefix) + " but there are " +
                       std::to_string(scores.keys) + " keys");
    if (!positions.has_value()) return positions;
    const int64_t rank = positions->dim();
    const int64_t patches = scores.keys - num_prefix;
    const bool patches_alone = rank >= 2 && positions->size(rank - 2) == patches;
    const int64_t tokens = patches_alone ? patches : scores.keys;
    if (rank == 2) {
      place.check(*positions, "positions", {tokens, kAny});
    } else {
      place.check(*positions, "positions", {kAny, tokens, kAny});
    }
    check_dtype(*positions, "positions", ScalarType::Float);
    check_argument(scores.queries == scores.keys, "positions need as many queries as keys, got " +
                                                      std::to_string(scores.queries) + " and " +
                                                      std::to_string(scores.keys));
    const bool per_image = rank == 3 && positions->size(0) != 1;
    check_argument((!per_image || positions->size(0) == scores.batch) &&
                       positions->size(rank - 1) >= 1 && positions->size(rank - 1) <= 3,
                   "positions have shape " + shape_text(positions->sizes().data(), rank) +
                       ", expected [1 or " + std::to_string(scores.batch) + ", " +
                       std::to_string(tokens) + ", 1 to 3]");
    return rows_of(positions);
  }

 private:
  OptionalTensor checked_bias(const OptionalTensor& given) const {
    if (!given.has_value()) return given;
    place.check(*given, "bias", {kAny, kAny, scores.queries, scores.keys});
    const bool good = (given->size(0) == 1 || given->size(0) == scores.batch) &&
                      (given->size(1) == 1 || given->size(1) == scores.heads);
    check_argument(good, "bias has shape " +
                             shape_text(given->sizes().data(), given->sizes().size()) +
                             ", expected [1 or " + std::to_string(scores.batch) + ", 1 or " +
                             std::to_string(scores.heads) + ", ...]");
    if (given->scalar_type() != ScalarType::Float) check_dtype(*given, "bias", type());
    return rows_of(given);
  }
};

// run(params) starts the kernels.
template <typename Place, typename Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd_at(
    const Place& place, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const OptionalTensor& bias_any, const OptionalTensor& key_mask_any, double scale,
    int64_t num_prefix, const OptionalTensor& positions_any, int64_t stats, Run run) {
  const ScoreTensors<Place> tensors(place, q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const Tensor v = tensors.checked_values(v_any);
  const OptionalTensor positions = tensors.checked_positions(positions_any, num_prefix);
  const int64_t planes = count_planes(stats);
  check_argument((stats & kDistance) == 0 || positions.has_value(), "distance needs positions");
  check_argument((stats & kSelfMass) == 0 || s.queries == s.keys,
                 "self_mass needs as many queries as keys, got " + std::to_string(s.queries) +
                     " and " + std::to_string(s.keys));
  AttentionFwdParams params;
  params.scores = s;
  params.v = view_heads(v);
  params.num_prefix = num_prefix;
  params.positions = view_positions(positions, s.keys);
  params.stats = stats;
  Tensor out = place.empty({s.batch, s.queries, s.heads, s.dim}, tensors.type());
  Tensor lse = place.empty({s.batch, s.heads, s.queries}, ScalarType::Float);
  Tensor lse_low = place.empty({s.batch, s.heads, s.queries}, ScalarType::Float);
  Tensor rows = place.empty({planes, s.batch, s.heads, s.queries}, ScalarType::Float);
  params.out = out.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());
  params.lse_low = static_cast<float*>(lse_low.data_ptr());
  params.rows = static_cast<float*>(rows.data_ptr());
  run(params);
  return {out, lse, lse_low, rows};
}

template <typename Place, typename Run>
Tensor attention_coef_at(const Place& place, const OptionalTensor& dlse_any, const Tensor& rows_any,
                         const OptionalTensor& drows_any, int64_t stats, Run run) {
  const int64_t planes = count_planes(stats);
  place.check(rows_any, "rows", {planes, kAny, kAny, kAny});
  const int64_t batch = rows_any.size(1), heads = rows_any.size(2), queries = rows_any.size(3);
  check_argument((stats & kPatchEntropy) == 0 || (stats & kPatchMass) != 0,
                 "the gradient of patch_entropy needs patch_mass");
  // Contiguous fp32, kept alive in `kept`.
  std::vector<Tensor> kept;
  const auto numbers = [&](const Tensor& tensor, const char* name,
                           std::initializer_list<int64_t> sizes) {
    place.check(tensor, name, sizes);
    check_dtype(tensor, name, ScalarType::Float);
    kept.push_back(torch::stable::contiguous(tensor));
    return static_cast<const float*>(kept.back().data_ptr());
  };
  AttentionCoefParams params;
  params.count = batch * heads * queries;
  params.stats = stats;
  params.rows = numbers(rows_any, "rows", {planes, batch, heads, queries});
  params.has_dlse = dlse_any.has_value();
  params.has_drows = drows_any.has_value();
  if (params.has_dlse) params.dlse = numbers(*dlse_any, "dlse", {batch, heads, queries});
  if (params.has_drows) {
    params.drows = numbers(*drows_any, "drows", {planes, batch, heads, queries});
  }
  Tensor coef = place.empty({6, batch, heads, queries}, ScalarType::Float);
  params.coef = static_cast<float*>(coef.data_ptr());
  run(params);
  return coef;
}

template <typename Place, typename Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_at(
    const Place& place, const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any,
    const Tensor& v_any, const Tensor& out_any, const Tensor& lse_any, const Tensor& lse_low_any,
    const OptionalTensor& bias_any, const OptionalTensor& key_mask_any, double scale,
    int64_t num_prefix, const OptionalTensor& positions_any, const OptionalTensor& coef_any,
    bool need_bias, bool packed, Run run) {
  const ScoreTensors<Place> tensors(place, q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const ScalarType type = tensors.type();
  const Tensor v = tensors.checked_values(v_any);
  place.check(out_any, "out", {s.batch, s.queries, s.heads, s.dim});
  check_dtype(out_any, "out", type);
  place.check(dout_any, "dout", {s.batch, s.queries, s.heads, s.dim});
  check_dtype(dout_any, "dout", type);
  const Tensor out = rows_of(out_any);
  const Tensor dout = rows_of(dout_any);
  const Tensor lse = tensors.checked_lse(lse_any, "lse");
  const Tensor lse_low = tensors.checked_lse(lse_low_any, "lse_low");
  const OptionalTensor positions = tensors.checked_positions(positions_any, num_prefix);
  OptionalTensor coef;
  if (coef_any.has_value()) {
    place.check(*coef_any, "coef", {6, s.batch, s.heads, s.queries});
    check_dtype(*coef_any, "coef", ScalarType::Float);
    coef = torch::stable::contiguous(*coef_any);
  }
  check_argument(!need_bias || tensors.bias.has_value(), "need_bias without a bias");
  check_argument(!packed || s.queries == s.keys,
                 "packed gradients need as many queries as keys, got " + std::to_string(s.queries) +
                     " and " + std::to_string(s.keys));
  AttentionBwdParams params;
  params.scores = s;
  params.v = view_heads(v);
  params.out = view_tokens(out);
  params.dout = view_tokens(dout);
  params.num_prefix = num_prefix;
  params.positions = view_positions(positions, s.keys);
  params.lse = static_cast<const float*>(lse.data_ptr());
  params.lse_low = static_cast<const float*>(lse_low.data_ptr());
  params.has_coef = coef.has_value();
  if (params.has_coef) params.coef = static_cast<const float*>(coef->data_ptr());
  // Packed, the first holds all three.
  Tensor dq = packed ? place.empty({s.batch, s.queries, 3, s.heads, s.dim}, type)
                     : place.empty({s.batch, s.queries, s.heads, s.dim}, type);
  Tensor dk =
      packed ? place.empty({0}, type) : place.empty({s.batch, s.keys, s.heads, s.dim}, type);
  Tensor dv =
      packed ? place.empty({0}, type) : place.empty({s.batch, s.keys, s.heads, s.dim}, type);
  Tensor dbias = need_bias ? place.empty({s.bias.batch, s.bias.heads, s.queries, s.keys},
                                         tensors.bias->scalar_type())
                           : place.empty({0}, type);
  const int64_t width = s.heads * s.dim;
  const int64_t part_bytes = width * static_cast<int64_t>(dq.element_size());
  char* const first = static_cast<char*>(dq.data_ptr());
  params.stride_grad = packed ? 3 * width : width;
  params.dq = first;
  params.dk = packed ? first + part_bytes : dk.data_ptr();
  params.dv = packed ? first + 2 * part_bytes : dv.data_ptr();
  params.dbias = output_ptr(need_bias, dbias);
  run(params);
  return {dq, dk, dv, dbias};
}

template <typename Place, typename Run>
Tensor received_attention_at(const Place& place, const Tensor& q_any, const Tensor& k_any,
                             const Tensor& lse_any, const OptionalTensor& bias_any,
                             const OptionalTensor& key_mask_any, double scale, Run run) {
  const ScoreTensors<Place> tensors(place, q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const Tensor lse = tensors.checked_lse(lse_any, "lse");
  Tensor out = place.empty({s.batch, s.heads, s.keys}, ScalarType::Float);
  ReceivedAttentionParams params;
  params.scores = s;
  params.lse = static_cast<const float*>(lse.data_ptr());
  params.out = static_cast<float*>(out.data_ptr());
  run(params);
  return out;
}

template <typename Place, typename Run>
Tensor head_divergence_at(const Place& place, const Tensor& q_any, const Tensor& k_any,
                          const Tensor& lse_any, const OptionalTensor& bias_any,
                          const OptionalTensor& key_mask_any, double scale, Run run) {
  const ScoreTensors<Place> tensors(place, q_any, k_any, bias_any, key_mask_any, scale);
  const AttentionScores& s = tensors.scores;
  const Tensor lse = tensors.checked_lse(lse_any, "lse");
  Tensor out = place.empty({s.batch, s.heads, s.heads}, ScalarType::Float);
  HeadDivergenceParams params;
  params.scores = s;
  params.lse = static_cast<const float*>(lse.data_ptr());
  params.out = static_cast<float*>(out.data_ptr());
  run(params);
  return out;
}

}  // namespace mimkernels::binding

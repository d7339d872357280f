// Bindings of attention, for every device.
#pragma once

#include <tuple>

#include "ops/attention/params.h"
#include "torch/score_args.h"

namespace mimkernels::binding {

// [B, N, H, D], as out and its gradient come.
inline HeadRows view_tokens(const Tensor& tensor) {
  HeadRows rows;
  rows.data = tensor.data_ptr();
  rows.stride_batch = tensor.stride(0);
  rows.stride_head = tensor.stride(2);
  rows.stride_token = tensor.stride(1);
  return rows;
}

// The statistics that `stats` has bits for.
inline int64_t count_planes(int64_t stats) {
  require(stats >= 0 && stats <= kAllStats, "stats has bits of statistics alone");
  return __builtin_popcountll(static_cast<uint64_t>(stats));
}

// v, and positions of all tokens or of those after the prefix alone.
template <typename Device>
struct ValueInputs {
  Tensor v;
  OptionalTensor positions;

  template <typename Params>
  ValueInputs(Params& params, const ScoreInputs<Device>& inputs, const Tensor& v_any,
              int64_t num_prefix, const OptionalTensor& positions_any)
      : v(take(inputs.device, v_any, "v",
               {inputs.scores.batch, inputs.scores.heads, inputs.scores.keys, inputs.scores.dim},
               inputs.type())) {
    const AttentionScores& s = inputs.scores;
    require(num_prefix >= 0 && num_prefix <= s.keys, "0 <= num_prefix <= keys");
    params.scores = s;
    params.v = view_heads(v);
    params.num_prefix = num_prefix;
    if (!positions_any.has_value()) return;
    require(s.queries == s.keys, "positions have as many queries as keys");
    const int64_t rank = positions_any->dim();
    const bool patches_alone = rank >= 2 && positions_any->size(rank - 2) == s.keys - num_prefix;
    const int64_t tokens = patches_alone ? s.keys - num_prefix : s.keys;
    const ScalarType type = ScalarType::Float;
    positions =
        rank == 2
            ? take(inputs.device, *positions_any, "positions", {tokens, kAnySize}, type)
            : take(inputs.device, *positions_any, "positions", {kAnySize, tokens, kAnySize}, type);
    const bool per_image = rank == 3 && positions->size(0) != 1;
    require(!per_image || positions->size(0) == s.batch, "positions of 1 image or of all");
    require(positions->size(rank - 1) >= 1 && positions->size(rank - 1) <= 3,
            "positions have 1 to 3 dims");
    Positions& view = params.positions;
    view.data = floats(*positions);
    view.given = true;
    view.first = s.keys - tokens;
    view.stride_batch = per_image ? positions->stride(0) : 0;
    view.stride_token = positions->stride(rank - 2);
    view.dims = static_cast<int>(positions->size(rank - 1));
  }
};

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor bias,
    OptionalTensor bias_table, OptionalTensor bias_index, OptionalTensor key_mask,
    OptionalTensor logit_scale, double scale, int64_t num_prefix, OptionalTensor positions,
    int64_t stats) {
  Device device(q);
  AttentionFwdParams params;
  const ScoreInputs<Device> inputs(device, q, k, bias, bias_table, bias_index, key_mask,
                                   logit_scale, scale);
  const ValueInputs<Device> values(params, inputs, v, num_prefix, positions);
  const AttentionScores& s = params.scores;
  const int64_t planes = count_planes(stats);
  require((stats & kDistance) == 0 || params.positions.given, "distance has positions");
  require((stats & kSelfMass) == 0 || s.queries == s.keys, "self_mass has as many queries as keys");
  params.stats = stats;
  Tensor out = device.empty({s.batch, s.queries, s.heads, s.dim}, inputs.type());
  Tensor lse = device.empty({s.batch, s.heads, s.queries}, ScalarType::Float);
  Tensor lse_low = device.empty({s.batch, s.heads, s.queries}, ScalarType::Float);
  Tensor rows = device.empty({planes, s.batch, s.heads, s.queries}, ScalarType::Float);
  params.out = out.data_ptr();
  params.lse = floats(lse);
  params.lse_low = floats(lse_low);
  params.rows = floats(rows);
  device.run(params);
  return {out, lse, lse_low, rows};
}

template <typename Device>
Tensor attention_coef(OptionalTensor dlse_any, const Tensor& rows_any, OptionalTensor drows_any,
                      int64_t stats) {
  const Device device(rows_any);
  const ScalarType type = ScalarType::Float;
  const int64_t planes = count_planes(stats);
  require((stats & kPatchEntropy) == 0 || (stats & kPatchMass) != 0,
          "patch_entropy comes with patch_mass");
  const Tensor rows =
      take_contiguous(device, rows_any, "rows", {planes, kAnySize, kAnySize, kAnySize}, type);
  const int64_t batch = rows.size(1), heads = rows.size(2), queries = rows.size(3);
  AttentionCoefParams params;
  params.count = batch * heads * queries;
  params.stats = stats;
  params.rows = floats(rows);
  OptionalTensor dlse, drows;
  if (dlse_any.has_value()) {
    dlse = take_contiguous(device, *dlse_any, "dlse", {batch, heads, queries}, type);
    params.has_dlse = true;
    params.dlse = floats(*dlse);
  }
  if (drows_any.has_value()) {
    drows = take_contiguous(device, *drows_any, "drows", {planes, batch, heads, queries}, type);
    params.has_drows = true;
    params.drows = floats(*drows);
  }
  Tensor coef = device.empty({6, batch, heads, queries}, type);
  params.coef = floats(coef);
  device.run(params);
  return coef;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout_any, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out_any, const Tensor& lse_any, const Tensor& lse_low_any, OptionalTensor bias,
    OptionalTensor bias_table, OptionalTensor bias_index, OptionalTensor key_mask,
    OptionalTensor logit_scale, double scale, int64_t num_prefix, OptionalTensor positions,
    OptionalTensor coef_any, bool need_bias, bool need_table, bool need_logit_scale, bool packed) {
  Device device(q);
  AttentionBwdParams params;
  const ScoreInputs<Device> inputs(device, q, k, bias, bias_table, bias_index, key_mask,
                                   logit_scale, scale);
  const ValueInputs<Device> values(params, inputs, v, num_prefix, positions);
  const AttentionScores& s = params.scores;
  const ScalarType type = inputs.type();
  const Tensor out = take(device, out_any, "out", {s.batch, s.queries, s.heads, s.dim}, type);
  const Tensor dout = take(device, dout_any, "dout", {s.batch, s.queries, s.heads, s.dim}, type);
  const Tensor lse = inputs.take_lse(lse_any, "lse");
  const Tensor lse_low = inputs.take_lse(lse_low_any, "lse_low");
  OptionalTensor coef;
  if (coef_any.has_value()) {
    coef = take_contiguous(device, *coef_any, "coef", {6, s.batch, s.heads, s.queries},
                           ScalarType::Float);
    params.has_coef = true;
    params.coef = floats(*coef);
  }
  require(!need_bias || inputs.bias.has_value(), "need_bias has a bias");
  require(!need_table || inputs.bias_table.has_value(), "need_table has a bias_table");
  require(!need_logit_scale || s.cosine.given, "need_logit_scale has a logit_scale");
  require(!packed || s.queries == s.keys, "packed gradients have as many queries as keys");
  params.out = view_tokens(out);
  params.dout = view_tokens(dout);
  params.lse = floats(lse);
  params.lse_low = floats(lse_low);
  // Packed, the first holds all three.
  Tensor dq = packed ? device.empty({s.batch, s.queries, 3, s.heads, s.dim}, type)
                     : device.empty({s.batch, s.queries, s.heads, s.dim}, type);
  Tensor dk = empty_if(device, !packed, {s.batch, s.keys, s.heads, s.dim}, type);
  Tensor dv = empty_if(device, !packed, {s.batch, s.keys, s.heads, s.dim}, type);
  Tensor dbias = need_bias ? device.empty({s.bias.windows, s.bias.heads, s.queries, s.keys},
                                          inputs.bias->scalar_type())
                           : device.empty({0}, type);
  Tensor dtable = need_table
                      ? device.empty({s.table.entries, s.heads}, inputs.bias_table->scalar_type())
                      : device.empty({0}, type);
  Tensor dlogit_scale = device.empty({need_logit_scale ? s.heads : 0}, ScalarType::Float);
  const int64_t width = s.heads * s.dim;
  const int64_t part_bytes = width * static_cast<int64_t>(dq.element_size());
  char* const first = static_cast<char*>(dq.data_ptr());
  params.stride_grad = packed ? 3 * width : width;
  params.dq = first;
  params.dk = packed ? first + part_bytes : dk.data_ptr();
  params.dv = packed ? first + 2 * part_bytes : dv.data_ptr();
  params.dbias = output_ptr(need_bias, dbias);
  params.dtable = output_ptr(need_table, dtable);
  params.dlogit_scale = static_cast<float*>(output_ptr(need_logit_scale, dlogit_scale));
  device.run(params);
  return {dq, dk, dv, dbias, dtable, dlogit_scale};
}

}  // namespace mimkernels::binding

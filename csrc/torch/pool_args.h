// Arguments of the pooling ops as parameters of their kernels, on the CPU and on CUDA.
// `check(tensor, name, sizes)` refuses other sizes, kAny apart, and other devices.
#pragma once

#include <utility>

#include "core/token_pool.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// The tensors whose memory a call reads, alive until it returns.
struct PoolInputs {
  OptionalTensor x;
  OptionalTensor queries;
  OptionalTensor values;
  OptionalTensor mask;
  OptionalTensor scores;  // of reduce_pool: p
  OptionalTensor saved;   // weights, or what reduce_pool saves
  OptionalTensor dout;
  OptionalTensor dweights;
};

// [B, G, size], or, for one group, [B, size].
template <typename Check>
void check_groups(const Check& check, const Tensor& tensor, const char* name, int64_t batch,
                  int64_t groups, int64_t size) {
  if (tensor.dim() == 2 && (groups == 1 || groups == kAny)) {
    check(tensor, name, {batch, size});
  } else {
    check(tensor, name, {batch, groups, size});
  }
}

inline Rows view_groups(const OptionalTensor& tensor) {
  Rows rows = view_rows(tensor);
  if (tensor->dim() == 2) std::swap(rows.stride0, rows.stride1);
  return rows;
}

template <typename Params, typename Check>
void set_pooled_tokens(Params& params, PoolInputs& inputs, const Check& check, const Tensor& x,
                       const OptionalTensor& mask, int64_t num_prefix) {
  check(x, "x", {kAny, kAny, kAny});
  params.dtype = dtype_of(x.scalar_type(), "x", false);
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.dim = x.size(2);
  check_size(num_prefix, "num_prefix", 0);
  check_size(params.tokens, "tokens of x", num_prefix);
  params.num_prefix = num_prefix;
  inputs.x = rows_of(x);
  params.x = view_rows(inputs.x);
  if (!mask.has_value()) return;
  check(*mask, "mask", {params.batch, params.tokens});
  check_dtype(*mask, "mask", ScalarType::Bool);
  inputs.mask = rows_of(mask);
  params.mask = view_mask(*inputs.mask);
}

// Queries and values beside x, for forward and backward.
template <typename Params, typename Check>
void set_queries(Params& params, PoolInputs& inputs, const Check& check, const Tensor& x,
                 const Tensor& queries, const OptionalTensor& values, double scale, bool sliced) {
  if (queries.dim() == 2) {
    check(queries, "queries", {kAny, params.dim});
  } else {
    check(queries, "queries", {params.batch, kAny, params.dim});
  }
  check_dtype(queries, "queries", x.scalar_type());
  params.groups = queries.size(queries.dim() - 2);
  params.width = params.dim;
  if (values.has_value()) {
    check(*values, "values", {params.batch, params.tokens, kAny});
    check_dtype(*values, "values", x.scalar_type());
    params.width = values->size(2);
  }
  check_argument(!sliced || (params.groups > 0 && params.width % params.groups == 0),
                 "the queries do not cut the values into equal slices");
  params.sliced = sliced;
  params.scale = static_cast<float>(scale);
  params.pools_x = !values.has_value();
  params.has_queries = true;
  inputs.queries = rows_of(queries);
  params.queries = view_rows(inputs.queries);
  inputs.values = rows_of(values);
  params.values = params.pools_x ? params.x : view_rows(inputs.values);
}

// What both directions of weighted_pool have in common: the values are x, and there are no queries.
template <typename Params, typename Check>
void set_scores(Params& params, PoolInputs& inputs, const Check& check, const Tensor& scores,
                const char* name, bool normalize) {
  check_groups(check, scores, name, params.batch, kAny, params.tokens);
  check_dtype(scores, name, ScalarType::Float);
  params.groups = scores.dim() == 2 ? 1 : scores.size(1);
  params.width = params.dim;
  params.softmax = normalize;
  params.pools_x = true;
  params.values = params.x;
  inputs.scores = rows_of(scores);
}

// dout, dweights and the weights of the forward.
template <typename Check>
void set_pool_gradients(TokenPoolBwdParams& params, PoolInputs& inputs, const Check& check,
                        const Tensor& x, const Tensor& dout, const OptionalTensor& dweights,
                        const Tensor& weights) {
  check_groups(check, dout, "dout", params.batch, params.groups,
               params.sliced ? params.width / params.groups : params.width);
  check_dtype(dout, "dout", x.scalar_type());
  inputs.dout = rows_of(dout);
  params.dout = view_groups(inputs.dout);
  if (dweights.has_value()) {
    check_groups(check, *dweights, "dweights", params.batch, params.groups, params.tokens);
    check_dtype(*dweights, "dweights", ScalarType::Float);
    inputs.dweights = rows_of(dweights);
    params.dweights = view_groups(inputs.dweights);
  }
  check_groups(check, weights, "weights", params.batch, params.groups, params.tokens);
  check_dtype(weights, "weights", ScalarType::Float);
  inputs.saved = torch::stable::contiguous(weights);
  params.weights = static_cast<const float*>(inputs.saved->data_ptr());
}

inline ReduceKind reduce_kind(int64_t kind) {
  check_argument(kind >= 0 && kind <= 2,
                 "kind is " + std::to_string(kind) + ", expected 0, 1 or 2");
  return static_cast<ReduceKind>(kind);
}

template <typename Check>
void set_exponent(ReducePoolParams& params, PoolInputs& inputs, const Check& check,
                  const OptionalTensor& p, double eps) {
  params.eps = static_cast<float>(eps);
  if (params.kind != ReduceKind::kGem) return;
  check_argument(p.has_value(), "the power mean needs p");
  check(*p, "p", {1});
  check_dtype(*p, "p", ScalarType::Float);
  inputs.scores = *p;
  params.p = static_cast<const float*>(inputs.scores->data_ptr());
}

template <typename Check>
PoolInputs set_reduce_fwd(ReducePoolParams& params, const Check& check, const Tensor& x,
                          const OptionalTensor& mask, int64_t kind, int64_t num_prefix,
                          const OptionalTensor& p, double eps) {
  PoolInputs inputs;
  set_pooled_tokens(params, inputs, check, x, mask, num_prefix);
  params.kind = reduce_kind(kind);
  set_exponent(params, inputs, check, p, eps);
  return inputs;
}

template <typename Check>
PoolInputs set_reduce_bwd(ReducePoolParams& params, const Check& check, const Tensor& dout,
                          const OptionalTensor& x, const Tensor& saved, const OptionalTensor& mask,
                          int64_t kind, int64_t tokens, int64_t num_prefix, const OptionalTensor& p,
                          double eps) {
  PoolInputs inputs;
  check(dout, "dout", {kAny, kAny});
  params.kind = reduce_kind(kind);
  params.dtype = dtype_of(dout.scalar_type(), "dout", false);
  params.batch = dout.size(0);
  params.dim = dout.size(1);
  check_size(num_prefix, "num_prefix", 0);
  check_size(tokens, "tokens", num_prefix);
  params.tokens = tokens;
  params.num_prefix = num_prefix;
  inputs.dout = rows_of(dout);
  params.dout = view_rows(inputs.dout);
  if (mask.has_value()) {
    check(*mask, "mask", {params.batch, tokens});
    check_dtype(*mask, "mask", ScalarType::Bool);
    inputs.mask = rows_of(mask);
    params.mask = view_mask(*inputs.mask);
  }
  if (params.kind != ReduceKind::kMean) {
    check(saved, "saved", {params.batch, params.dim});
    check_dtype(saved, "saved",
                params.kind == ReduceKind::kMax ? ScalarType::Int : ScalarType::Float);
    inputs.saved = torch::stable::contiguous(saved);
    if (params.kind == ReduceKind::kMax) {
      params.index = static_cast<int32_t*>(inputs.saved->data_ptr());
    } else {
      params.moment = static_cast<float*>(inputs.saved->data_ptr());
    }
  }
  set_exponent(params, inputs, check, p, eps);
  if (params.kind == ReduceKind::kGem) {
    check_argument(x.has_value(), "the gradient of the power mean needs x");
    check(*x, "x", {params.batch, tokens, params.dim});
    check_dtype(*x, "x", dout.scalar_type());
    inputs.x = rows_of(x);
    params.x = view_rows(inputs.x);
  }
  return inputs;
}

template <typename Check>
PoolInputs set_query_fwd(TokenPoolFwdParams& params, const Check& check, const Tensor& x,
                         const Tensor& queries, const OptionalTensor& values,
                         const OptionalTensor& mask, double scale, int64_t num_prefix,
                         bool sliced) {
  PoolInputs inputs;
  set_pooled_tokens(params, inputs, check, x, mask, num_prefix);
  set_queries(params, inputs, check, x, queries, values, scale, sliced);
  return inputs;
}

template <typename Check>
PoolInputs set_query_bwd(TokenPoolBwdParams& params, const Check& check, const Tensor& dout,
                         const OptionalTensor& dweights, const Tensor& x, const Tensor& queries,
                         const OptionalTensor& values, const Tensor& weights,
                         const OptionalTensor& mask, double scale, int64_t num_prefix,
                         bool sliced) {
  PoolInputs inputs;
  set_pooled_tokens(params, inputs, check, x, mask, num_prefix);
  set_queries(params, inputs, check, x, queries, values, scale, sliced);
  set_pool_gradients(params, inputs, check, x, dout, dweights, weights);
  params.shared_queries = queries.dim() == 2;
  return inputs;
}

template <typename Check>
PoolInputs set_weighted_fwd(TokenPoolFwdParams& params, const Check& check, const Tensor& x,
                            const Tensor& scores, const OptionalTensor& mask, bool normalize,
                            int64_t num_prefix) {
  PoolInputs inputs;
  set_pooled_tokens(params, inputs, check, x, mask, num_prefix);
  set_scores(params, inputs, check, scores, "scores", normalize);
  params.scores = view_groups(inputs.scores);
  return inputs;
}

template <typename Check>
PoolInputs set_weighted_bwd(TokenPoolBwdParams& params, const Check& check, const Tensor& dout,
                            const OptionalTensor& dweights, const Tensor& x, const Tensor& weights,
                            const OptionalTensor& mask, bool normalize, int64_t num_prefix) {
  PoolInputs inputs;
  set_pooled_tokens(params, inputs, check, x, mask, num_prefix);
  set_scores(params, inputs, check, weights, "weights", normalize);
  set_pool_gradients(params, inputs, check, x, dout, dweights, weights);
  return inputs;
}

}  // namespace mimkernels::binding

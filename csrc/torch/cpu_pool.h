// Bindings of the pooling ops: query_pool, weighted_pool, reduce_pool.
#pragma once

#include <tuple>

#include "cpu/dispatch.h"
#include "torch/pool_args.h"

namespace mimkernels::binding {

inline std::tuple<Tensor, Tensor> token_pool_fwd(TokenPoolFwdParams& params, const char* op,
                                                 ScalarType type, bool one_group = false) {
  const int64_t width = params.sliced ? params.width / params.groups : params.width;
  Tensor out = one_group ? new_output({params.batch, width}, type)
                         : new_output({params.batch, params.groups, width}, type);
  Tensor weights =
      one_group ? new_output({params.batch, params.tokens}, ScalarType::Float)
                : new_output({params.batch, params.groups, params.tokens}, ScalarType::Float);
  params.out = out.data_ptr();
  params.weights = static_cast<float*>(weights.data_ptr());
  raise_if_failed(cpu_kernels().token_pool_fwd(params, &torch_pool), op, "", false);
  return {out, weights};
}

inline std::tuple<Tensor, Tensor> query_pool_fwd(const Tensor& x, const Tensor& queries,
                                                 OptionalTensor values, OptionalTensor mask,
                                                 double scale, int64_t num_prefix, bool sliced) {
  TokenPoolFwdParams params;
  const PoolInputs inputs =
      set_query_fwd(params, check_shape, x, queries, values, mask, scale, num_prefix, sliced);
  return token_pool_fwd(params, "query_pool", x.scalar_type());
}

inline std::tuple<Tensor, Tensor, Tensor> query_pool_bwd(
    const Tensor& dout, OptionalTensor dweights, const Tensor& x, const Tensor& queries,
    OptionalTensor values, const Tensor& weights, OptionalTensor mask, double scale,
    int64_t num_prefix, bool sliced, bool need_x, bool need_queries, bool need_values) {
  TokenPoolBwdParams params;
  const PoolInputs inputs = set_query_bwd(params, check_shape, dout, dweights, x, queries, values,
                                          weights, mask, scale, num_prefix, sliced);
  const ScalarType type = x.scalar_type();
  need_values = need_values && values.has_value();
  Tensor dx = new_output_if(need_x, {params.batch, params.tokens, params.dim}, type);
  Tensor dqueries =
      params.shared_queries
          ? new_output_if(need_queries, {params.groups, params.dim}, type)
          : new_output_if(need_queries, {params.batch, params.groups, params.dim}, type);
  Tensor dvalues = new_output_if(need_values, {params.batch, params.tokens, params.width}, type);
  params.dx = output_ptr(need_x, dx);
  params.dqueries = output_ptr(need_queries, dqueries);
  params.dvalues = output_ptr(need_values, dvalues);
  raise_if_failed(cpu_kernels().token_pool_bwd(params, &torch_pool), "query_pool", "", false);
  return {dx, dqueries, dvalues};
}

inline std::tuple<Tensor, Tensor> weighted_pool_fwd(const Tensor& x, const Tensor& scores,
                                                    OptionalTensor mask, bool normalize,
                                                    int64_t num_prefix) {
  TokenPoolFwdParams params;
  const PoolInputs inputs =
      set_weighted_fwd(params, check_shape, x, scores, mask, normalize, num_prefix);
  return token_pool_fwd(params, "weighted_pool", x.scalar_type(), scores.dim() == 2);
}

inline std::tuple<Tensor, Tensor> weighted_pool_bwd(const Tensor& dout, OptionalTensor dweights,
                                                    const Tensor& x, const Tensor& weights,
                                                    OptionalTensor mask, bool normalize,
                                                    int64_t num_prefix, bool need_x,
                                                    bool need_scores) {
  TokenPoolBwdParams params;
  const PoolInputs inputs = set_weighted_bwd(params, check_shape, dout, dweights, x, weights, mask,
                                             normalize, num_prefix);
  Tensor dx = new_output_if(need_x, {params.batch, params.tokens, params.dim}, x.scalar_type());
  Tensor dscores =
      weights.dim() == 2
          ? new_output_if(need_scores, {params.batch, params.tokens}, ScalarType::Float)
          : new_output_if(need_scores, {params.batch, params.groups, params.tokens},
                          ScalarType::Float);
  params.dx = output_ptr(need_x, dx);
  params.dscores = static_cast<float*>(output_ptr(need_scores, dscores));
  raise_if_failed(cpu_kernels().token_pool_bwd(params, &torch_pool), "weighted_pool", "", false);
  return {dx, dscores};
}

inline std::tuple<Tensor, Tensor> reduce_pool_fwd(const Tensor& x, OptionalTensor mask,
                                                  int64_t kind, int64_t num_prefix,
                                                  OptionalTensor p, double eps) {
  ReducePoolParams params;
  const PoolInputs inputs = set_reduce_fwd(params, check_shape, x, mask, kind, num_prefix, p, eps);
  const bool max = params.kind == ReduceKind::kMax;
  Tensor out = new_output({params.batch, params.dim}, x.scalar_type());
  Tensor saved = new_output_if(params.kind != ReduceKind::kMean, {params.batch, params.dim},
                               max ? ScalarType::Int : ScalarType::Float);
  params.out = out.data_ptr();
  params.index = static_cast<int32_t*>(output_ptr(max, saved));
  params.moment = static_cast<float*>(output_ptr(params.kind == ReduceKind::kGem, saved));
  raise_if_failed(cpu_kernels().reduce_pool_fwd(params, &torch_pool), "reduce_pool", "", false);
  return {out, saved};
}

inline std::tuple<Tensor, Tensor> reduce_pool_bwd(const Tensor& dout, OptionalTensor x,
                                                  const Tensor& saved, OptionalTensor mask,
                                                  int64_t kind, int64_t tokens, int64_t num_prefix,
                                                  OptionalTensor p, double eps, bool need_x,
                                                  bool need_p) {
  ReducePoolParams params;
  const PoolInputs inputs =
      set_reduce_bwd(params, check_shape, dout, x, saved, mask, kind, tokens, num_prefix, p, eps);
  need_p = need_p && params.kind == ReduceKind::kGem;
  Tensor dx = new_output_if(need_x, {params.batch, tokens, params.dim}, dout.scalar_type());
  Tensor dp = new_output_if(need_p, {1}, ScalarType::Float);
  params.dx = output_ptr(need_x, dx);
  params.dp = static_cast<float*>(output_ptr(need_p, dp));
  raise_if_failed(cpu_kernels().reduce_pool_bwd(params, &torch_pool), "reduce_pool", "", false);
  return {dx, dp};
}

}  // namespace mimkernels::binding

// Bindings of query_pool, for every device.
#pragma once

#include <tuple>

#include "torch/pool_args.h"

namespace mimkernels::binding {

// What forward and backward have in common. The tensors stay alive beside the pointers into them.
template <typename Device>
struct QueryInputs {
  PooledTokens<Device> pooled;
  Tensor queries;
  OptionalTensor values;

  template <typename Params>
  QueryInputs(Params& params, const Device& device, const Tensor& x, const Tensor& queries_any,
              const OptionalTensor& values_any, const OptionalTensor& mask, double scale,
              int64_t num_prefix, bool sliced)
      : pooled(params, device, x, mask, num_prefix),
        queries(queries_any.dim() == 2
                    ? take(device, queries_any, "queries", {kAnySize, params.dim}, type())
                    : take(device, queries_any, "queries", {params.batch, kAnySize, params.dim},
                           type())),
        values(
            take(device, values_any, "values", {params.batch, params.tokens, kAnySize}, type())) {
    params.groups = queries.size(queries.dim() - 2);
    params.width = values.has_value() ? values->size(2) : params.dim;
    require(!sliced || (params.groups > 0 && params.width % params.groups == 0),
            "queries divide the values into equal slices");
    params.sliced = sliced;
    params.scale = static_cast<float>(scale);
    params.pools_x = !values.has_value();
    params.has_queries = true;
    params.queries = view_rows(queries);
    params.values = params.pools_x ? params.x : view_rows(values);
  }

  ScalarType type() const { return pooled.type(); }
};

template <typename Device>
std::tuple<Tensor, Tensor> query_pool_fwd(const Tensor& x, const Tensor& queries,
                                          OptionalTensor values, OptionalTensor mask, double scale,
                                          int64_t num_prefix, bool sliced) {
  const Device device(x);
  TokenPoolFwdParams params;
  const QueryInputs<Device> inputs(params, device, x, queries, values, mask, scale, num_prefix,
                                   sliced);
  return run_token_pool_fwd(device, params, inputs.type(), false);
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> query_pool_bwd(const Tensor& dout, OptionalTensor dweights,
                                                  const Tensor& x, const Tensor& queries,
                                                  OptionalTensor values, const Tensor& weights,
                                                  OptionalTensor mask, double scale,
                                                  int64_t num_prefix, bool sliced, bool need_x,
                                                  bool need_queries, bool need_values) {
  const Device device(x);
  TokenPoolBwdParams params;
  const QueryInputs<Device> inputs(params, device, x, queries, values, mask, scale, num_prefix,
                                   sliced);
  const ScalarType type = inputs.type();
  const PoolGradients<Device> gradients(params, device, type, dout, dweights, weights);
  params.shared_queries = queries.dim() == 2;
  need_values = need_values && values.has_value();
  Tensor dx = empty_if(device, need_x, {params.batch, params.tokens, params.dim}, type);
  Tensor dqueries =
      params.shared_queries
          ? empty_if(device, need_queries, {params.groups, params.dim}, type)
          : empty_if(device, need_queries, {params.batch, params.groups, params.dim}, type);
  Tensor dvalues = empty_if(device, need_values, {params.batch, params.tokens, params.width}, type);
  params.dx = output_ptr(need_x, dx);
  params.dqueries = output_ptr(need_queries, dqueries);
  params.dvalues = output_ptr(need_values, dvalues);
  device.run(params);
  return {dx, dqueries, dvalues};
}

}  // namespace mimkernels::binding

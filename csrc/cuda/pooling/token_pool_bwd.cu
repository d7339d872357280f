#include "cuda/pooling/token_pool.h"
#include "cuda/pooling/token_products.h"
#include "cuda/row_sums.h"
#include "cuda/rows.cuh"

namespace mimkernels::cuda {
namespace {

bool needs_scores(const TokenPoolBwdParams& p) {
  return p.dscores != nullptr || (p.has_queries && (p.dx != nullptr || p.dqueries != nullptr));
}

// Floats of the gradient of the scores, unless it is asked for; what follows them is aligned to 16
// bytes.
int64_t score_floats(const TokenPoolBwdParams& p) {
  const int64_t scores = p.batch * p.groups * p.tokens;
  return needs_scores(p) && p.dscores == nullptr ? ceil_div(scores, 4) * 4 : 0;
}

// Each image's part of the gradient of shared queries.
int64_t query_floats(const TokenPoolBwdParams& p) {
  return p.dqueries != nullptr && p.shared_queries ? p.batch * p.groups * p.dim : 0;
}

// The products with x, or with the values.
TokenProducts products_of(const TokenPoolBwdParams& p, bool values) {
  TokenProducts products;
  products.dtype = p.dtype;
  products.batch = p.batch;
  products.tokens = p.tokens;
  products.num_prefix = p.num_prefix;
  products.groups = p.groups;
  products.dim = values ? p.width : p.dim;
  products.sliced = values && p.sliced;
  products.mask = p.mask;
  products.x = values ? p.values : p.x;
  return products;
}

cudaError_t query_gradients(const TokenPoolBwdParams& p, const float* ds, float* partial,
                            cudaStream_t stream) {
  TokenProducts products = products_of(p, false);
  products.scale = p.scale;
  if (!p.shared_queries) {
    return weigh_tokens(products, ds, p.dqueries, false, stream);
  }
  const cudaError_t error = weigh_tokens(products, ds, partial, true, stream);
  return error != cudaSuccess
             ? error
             : sum_partials(p.dtype, partial, p.batch, p.groups * p.dim, p.dqueries, stream);
}

}  // namespace

int64_t token_pool_bwd_workspace(const TokenPoolBwdParams& p) {
  return score_floats(p) + query_floats(p);
}

// The values are read once, for the gradient of the weights; x once more, for that of the queries.
cudaError_t token_pool_bwd(const TokenPoolBwdParams& p, float* workspace, cudaStream_t stream) {
  float* const ds = p.dscores != nullptr ? p.dscores : workspace;
  if (needs_scores(p)) {
    const TokenProducts products = products_of(p, true);
    cudaError_t error = token_dots(products, p.dout, ds, stream);
    if (error == cudaSuccess) {
      error = score_gradients(products, p.dweights, p.weights, p.softmax, ds, stream);
    }
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (p.dqueries != nullptr) {
    const cudaError_t error = query_gradients(p, ds, workspace + score_floats(p), stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  const TokenSpread of_scores = {p.has_queries ? ds : nullptr, p.queries, p.scale};
  const TokenSpread of_values = {p.weights, p.dout, 1.0f};
  if (p.dx != nullptr) {
    TokenProducts products = products_of(p, false);
    products.sliced = p.pools_x && p.sliced;
    const cudaError_t error =
        spread_tokens(products, of_scores, p.pools_x ? of_values : TokenSpread{}, p.dx, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return p.dvalues == nullptr
             ? cudaSuccess
             : spread_tokens(products_of(p, true), {}, of_values, p.dvalues, stream);
}

}  // namespace mimkernels::cuda

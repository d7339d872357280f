// The products of an image's tokens [N, D] with G vectors, and the softmax between them: what
// query_pool and weighted_pool are made of, forward and backward.
#pragma once

#include <cuda_runtime.h>

#include "core/token_pool.h"

namespace mimkernels::cuda {

struct TokenProducts {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t num_prefix = 0;
  int64_t groups = 0;
  int64_t dim = 0;      // columns of x
  bool sliced = false;  // vector g meets the columns of its own slice only, dim / groups of them
  float scale = 1.0f;
  BoolMask mask;
  Rows x;  // [B, N, D]; tokens that are not allowed are not read
};

// out[b, g, n] = scale * x[b, n] . vectors[b, g], fp32 [B, G, N]; 0 where a token is not allowed.
cudaError_t token_dots(const TokenProducts& p, const Rows& vectors, float* out,
                       cudaStream_t stream);

// out[b, g] = scale * the sum over allowed n of weights[b, g, n] * x[b, n], [B, G, D] or, sliced,
// [B, G, D / G]; of p.dtype, or fp32 where `to_float` (never sliced).
cudaError_t weigh_tokens(const TokenProducts& p, const float* weights, void* out, bool to_float,
                         cudaStream_t stream);

// weights [B, G, N]: the softmax of scores over the allowed tokens, or the scores where `softmax`
// is false; 0 elsewhere. weights may be the scores.
cudaError_t pool_weights(const TokenProducts& p, const Rows& scores, bool softmax, float* weights,
                         cudaStream_t stream);

// ds [B, G, N], which holds the gradient of the weights without dweights, becomes that of the
// scores; 0 where a token is not allowed. dweights may be null.
cudaError_t score_gradients(const TokenProducts& p, const Rows& dweights, const float* weights,
                            bool softmax, float* ds, cudaStream_t stream);

// weights [B, G, N] times vectors [B, G, D].
struct TokenSpread {
  const float* weights = nullptr;  // null: nothing
  Rows vectors;
  float scale = 1.0f;
};

// out[b, n] = the sum over g of the first term's and the second's products, [B, N, D] of p.dtype; 0
// where a token is not allowed. p.sliced: the second term's vector g has columns of its slice only.
cudaError_t spread_tokens(const TokenProducts& p, const TokenSpread& first,
                          const TokenSpread& second, void* out, cudaStream_t stream);

}  // namespace mimkernels::cuda

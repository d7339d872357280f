// What the launchers of query_pool and weighted_pool take; see params.h.
//
// Letters: B images, N tokens, P prefix tokens, D features of a token, G queries (or rows of
// scores), Dv features of a value, d = Dv / G the width of one query's slice.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/params.h"

namespace mimkernels {

// query_pool and weighted_pool forward:
//   a[b, g, :] = softmax over the allowed tokens of s[b, g, n], or s itself where softmax is false;
//   out[b, g, :] = sum over the allowed tokens of a[b, g, n] * values[b, n, columns of g].
// Either s = scale * (queries . x), or the scores are given. A token is allowed if n >= P and its
// mask is set.
struct TokenPoolFwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t num_prefix = 0;
  int64_t groups = 0;  // G
  int64_t dim = 0;     // D
  int64_t width = 0;   // Dv
  bool sliced = false;
  bool softmax = true;
  bool pools_x = false;      // the values are x
  bool has_queries = false;  // else there are scores; tokens of no columns have no query's address
  float scale = 1.0f;
  BoolMask mask;             // [B, N], true = allowed; not given: all
  Rows x;                    // [B, N, D], for queries
  Rows queries;              // [B, G, D], stride0 = 0 where images share them
  Rows scores;               // fp32 [B, G, N]
  Rows values;               // [B, N, Dv]
  void* out = nullptr;       // [B, G, Dv], or [B, G, d] sliced
  float* weights = nullptr;  // [B, G, N], 0 where a token is not allowed
};

// With da[b, g, n] = dout[b, g, :] . values[b, n, columns of g] + dweights[b, g, n] and
// ds = a * (da - sum over n of a * da), or da where softmax is false:
//   dvalues[b, n, :] = sum over g of a * dout,  dx[b, n, :] = scale * sum over g of ds * q,
//   dqueries[g, :] = scale * sum over (b,) n of ds * x,  dscores = ds.
struct TokenPoolBwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t num_prefix = 0;
  int64_t groups = 0;
  int64_t dim = 0;
  int64_t width = 0;
  bool sliced = false;
  bool softmax = true;
  bool pools_x = false;  // the values are x: dx is the sum of both gradients, dvalues null
  bool has_queries = false;
  bool shared_queries = false;  // images share them
  float scale = 1.0f;
  BoolMask mask;
  Rows dout;                       // [B, G, Dv] or [B, G, d]
  Rows dweights;                   // fp32 [B, G, N], optional
  Rows x;                          // [B, N, D], for queries
  Rows queries;                    // [B, G, D]
  Rows values;                     // [B, N, Dv]
  const float* weights = nullptr;  // [B, G, N]
  void* dx = nullptr;              // [B, N, D] or null
  void* dqueries = nullptr;        // [B, G, D], or [G, D] if shared, or null
  void* dvalues = nullptr;         // [B, N, Dv] or null
  float* dscores = nullptr;        // [B, G, N] or null
};

}  // namespace mimkernels

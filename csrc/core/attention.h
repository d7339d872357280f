// What the launchers of attention and of its companions share; see params.h.
//
// Letters: B images, H heads, Nq queries, Nk keys, D features of a head, P prefix tokens.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/params.h"

namespace mimkernels {

// A tensor indexed by (image, head, token) whatever the order of its dims; the features are
// contiguous.
struct HeadRows {
  const void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_token = 0;
};

// [W, H or 1, Nq, Nk], the last dim contiguous; image b takes row b % W. Strides of dims of size 1
// are 0.
struct ScoreBias {
  const void* data = nullptr;
  bool given = false;
  DType dtype = DType::kFloat32;
  int64_t windows = 1;  // divides B
  int64_t heads = 1;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_query = 0;
};

// [T, H], the last dim contiguous, and the int64 index [Nq, Nk] into it: the bias of scores (i, j)
// of head h is table[index[i, j], h].
struct ScoreTable {
  const void* data = nullptr;
  bool given = false;
  DType dtype = DType::kFloat32;
  int64_t entries = 0;
  int64_t stride_entry = 0;
  Ids index;
};

// Of cosine attention: q . k is multiplied by a factor of its row and one of its column,
// exp(min(logit_scale, ln 100)) / max(|q|, 1e-12) and 1 / max(|k|, 1e-12).
struct ScoreCosine {
  const float* logit_scale = nullptr;  // [H]
  bool given = false;
  // What kernels make of them.
  const float* rows = nullptr;     // [B, H, Nq], times the scale
  const float* columns = nullptr;  // [B, H, Nk], column_stride apart
  int64_t column_stride = 0;
};

// fp32 [B or 1, N - first, dims], the last dim contiguous: row i is where token first + i lies, and
// no earlier token lies anywhere. stride_batch is 0 where all images share them.
struct Positions {
  const float* data = nullptr;
  bool given = false;
  int64_t first = 0;
  int64_t stride_batch = 0;
  int64_t stride_token = 0;
  int dims = 0;
};

// The scores S = scale * q k^T + bias + table[index], -inf on keys that key_mask switches off; q k^T
// are cosines times their factor where those are asked for.
struct AttentionScores {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t dim = 0;
  float scale = 1.0f;
  HeadRows q;
  HeadRows k;
  ScoreBias bias;
  ScoreTable table;
  ScoreCosine cosine;
  BoolMask key_mask;  // [B, Nk]
};

// lse is a number of about log N only where scores are. Of a row with a large one, half a unit in
// its last place, by which it may be wrong, is more than the rounding of P: there the kernels
// compute the row's maximum m and l = log sum exp(S - m) again, and lse_low = (m - lse) + l.
// Elsewhere lse_low is 0.
constexpr float kLargeLse = 16.0f;

}  // namespace mimkernels

// What makes scores of the products of tile.cuh: biases, tables, masks, factors of cosines; P of them,
// and the distances between their tokens.
#pragma once

#include "cuda/attention/tile.cuh"

namespace mimkernels::cuda {

// What enters the scores of one head beside the products. folds: nothing is added and the scale is
// positive, so that products order the keys as scores do, and are scaled when they are subtracted.
struct HeadTerms {
  const AttentionScores& scores;  // what is rarely given is read from here, not kept in registers
  int b = 0;
  int h = 0;
  bool has_bias = false;
  bool has_mask = false;
  bool folds = false;
  const void* bias = nullptr;  // of this image and head
  int64_t bias_stride = 0;
  bool bias_is_float = false;
  const uint8_t* mask = nullptr;  // of this image
  int queries = 0;
  int keys = 0;

  __device__ __forceinline__ HeadTerms(const AttentionScores& s, int b, int h)
      : scores(s),
        b(b),
        h(h),
        has_bias(s.bias.given),
        has_mask(s.key_mask.given),
        folds(!has_bias && !s.table.given && s.scale > 0.0f),
        bias_stride(s.bias.stride_query),
        bias_is_float(s.bias.dtype == DType::kFloat32),
        queries(static_cast<int>(s.queries)),
        keys(static_cast<int>(s.keys)) {
    if (has_bias) {
      const int window = b % static_cast<int>(s.bias.windows);
      const int64_t offset = window * s.bias.stride_batch + h * s.bias.stride_head;
      bias = static_cast<const char*>(s.bias.data) + offset * (bias_is_float ? 4 : 2);
    }
    if (has_mask) {
      mask = s.key_mask.data + b * s.key_mask.stride0;
    }
  }
};

// The same for a lane's elements of one group. Bit 4 * u + e of hidden: the key does not exist or
// may not be attended.
struct GroupTerms {
  float bias[2][4];
  unsigned hidden;
  bool folds;
};

// The query and the key of element (u, e) of a group; KEYS: rows are keys.
template <bool KEYS>
__device__ __forceinline__ void locate(int first_row, int first_column, int u, int e, int& query,
                                       int& key) {
  const int lane = threadIdx.x % kWarp;
  const int row = first_row + lane / 4 + e / 2 * 8;
  const int column = first_column + u * 8 + lane % 4 * 2 + e % 2;
  query = KEYS ? column : row;
  key = KEYS ? row : column;
}

// Which of a lane's queries element i of a group belongs to: one of 4 columns where rows are keys,
// else one of 2 rows; and the token of the n-th of them.
template <bool KEYS>
constexpr int kQueries = KEYS ? 4 : 2;
template <bool KEYS>
__device__ __forceinline__ constexpr int query_of(int i) {
  return KEYS ? i / 4 * 2 + i % 2 : i % 4 / 2;
}
template <bool KEYS>
__device__ __forceinline__ int query_token(int first_row, int first_column, int n) {
  const int lane = threadIdx.x % kWarp;
  return KEYS ? first_column + n / 2 * 8 + lane % 4 * 2 + n % 2 : first_row + lane / 4 + n * 8;
}

// Tokens beyond the last read the last one's bias; entries outside the table add nothing.
template <typename T, bool KEYS>
__device__ __forceinline__ GroupTerms load_terms(const HeadTerms& head, int first_row,
                                                 int first_column) {
  GroupTerms terms;
  terms.hidden = 0;
  terms.folds = head.folds;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int query, key;
    locate<KEYS>(first_row, first_column, i / 4, i % 4, query, key);
    const bool hidden = key >= head.keys || (head.has_mask && head.mask[key] == 0);
    terms.hidden |= static_cast<unsigned>(hidden) << i;
    terms.bias[i / 4][i % 4] = 0.0f;
  }
  const auto load = [&](auto type) {
    using Bias = decltype(type);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int query, key;
      locate<KEYS>(first_row, first_column, i / 4, i % 4, query, key);
      const Bias* const row =
          static_cast<const Bias*>(head.bias) + min(query, head.queries - 1) * head.bias_stride;
      terms.bias[i / 4][i % 4] = to_float(row[min(key, head.keys - 1)]);
    }
  };
  if (head.has_bias && head.bias_is_float) {
    load(float{});
  } else if (head.has_bias) {
    load(T{});
  }
  const ScoreTable& table = head.scores.table;
  const auto look_up = [&](auto type) {
    using Entry = decltype(type);
    const Entry* const column = static_cast<const Entry*>(table.data) + head.h;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int query, key;
      locate<KEYS>(first_row, first_column, i / 4, i % 4, query, key);
      const int64_t* const row =
          table.index.data + min(query, head.queries - 1) * table.index.stride1;
      const int64_t entry = row[min(key, head.keys - 1)];
      if (static_cast<uint64_t>(entry) < static_cast<uint64_t>(table.entries)) {
        terms.bias[i / 4][i % 4] += to_float(column[entry * table.stride_entry]);
      }
    }
  };
  if (table.given && table.dtype == DType::kFloat32) {
    look_up(float{});
  } else if (table.given) {
    look_up(T{});
  }
  return terms;
}

// The factors of cosine attention of a lane's two rows and four columns of a group, 0 beyond the last
// token.
template <bool KEYS>
struct GroupFactors {
  float rows[2];
  float columns[4];

  __device__ __forceinline__ GroupFactors(const HeadTerms& head, int first_row, int first_column) {
    const ScoreCosine& cosine = head.scores.cosine;
    const int64_t place = head.b * head.scores.heads + head.h;
    const float* const of_queries = cosine.rows + place * head.queries;
    const float* const of_keys = cosine.columns + place * cosine.column_stride;
    const float* const of_rows = KEYS ? of_keys : of_queries;
    const float* const of_columns = KEYS ? of_queries : of_keys;
    const int row_tokens = KEYS ? head.keys : head.queries;
    const int column_tokens = KEYS ? head.queries : head.keys;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int token = query_token<false>(first_row, 0, n);
      rows[n] = token < row_tokens ? of_rows[token] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int token = query_token<true>(0, first_column, n);
      columns[n] = token < column_tokens ? of_columns[token] : 0.0f;
    }
  }
};

// Products become cosines, in cosine attention.
template <bool KEYS>
__device__ __forceinline__ void make_cosines(float (&score)[2][4], const HeadTerms& head,
                                             int first_row, int first_column) {
  if (!head.scores.cosine.given) {
    return;
  }
  const GroupFactors<KEYS> factors(head, first_row, first_column);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    score[i / 4][i % 4] *= factors.rows[query_of<false>(i)] * factors.columns[query_of<true>(i)];
  }
}

// dS becomes a factor of the product with the columns' q or k: times theirs of cosine attention.
// Of vectors that have no length in fp16 they are finite, but have no room there. Other products that
// have none become infinite, as dS does: a GradScaler has to see that.
template <typename T, bool KEYS>
__device__ __forceinline__ void weigh_columns(float (&ds)[2][4], const HeadTerms& head,
                                              int first_row, int first_column) {
  if (!head.scores.cosine.given) {
    return;
  }
  const GroupFactors<KEYS> factors(head, first_row, first_column);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float& x = ds[i / 4][i % 4];
    const float factor = factors.columns[query_of<true>(i)];
    x *= factor;
    if constexpr (std::is_same_v<T, __half>) {
      const float clamped = x > kLargestHalf ? kLargestHalf : x < -kLargestHalf ? -kLargestHalf : x;
      x = factor > kLargestHalf ? clamped : x;
    }
  }
}

// Products become scores: scaled, with bias (unless `raw`), -inf where the key is hidden (where
// `checks`: the group may have hidden keys).
__device__ __forceinline__ void finish_scores(float (&score)[2][4], const GroupTerms& terms,
                                              bool raw, bool checks, float scale) {
  if (!raw) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      score[i / 4][i % 4] = fmaf(score[i / 4][i % 4], scale, terms.bias[i / 4][i % 4]);
    }
  }
  if (checks) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (terms.hidden >> i & 1) {
        score[i / 4][i % 4] = -kInfinity;
      }
    }
  }
}

// lse of a query and what rounding took from it, the latter in the units of exponents. lse is +inf
// where P is 0: nothing may be attended, or no such query.
struct Level {
  float lse;
  float low;
};

template <typename T>
__device__ __forceinline__ Level load_level(const float* lse, const float* low, int64_t head,
                                            int queries, int query) {
  if (query >= queries) {
    return {kInfinity, 0.0f};
  }
  const float level = lse[head * queries + query];
  return {level == -kInfinity ? kInfinity : level, low[head * queries + query] * kUnitsOfOne<T>};
}

// Products become S - lse, -inf where the key is hidden. lse is subtracted from whole scores: both
// may be huge, as a bias of -1e9 makes them, where their difference has lost nothing.
template <bool KEYS>
__device__ __forceinline__ void subtract_lse(float (&score)[2][4], const GroupTerms& terms,
                                             const Level (&level)[kQueries<KEYS>], float scale) {
  if (terms.folds) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      score[i / 4][i % 4] = fmaf(score[i / 4][i % 4], scale, -level[query_of<KEYS>(i)].lse);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      score[i / 4][i % 4] =
          fmaf(score[i / 4][i % 4], scale, terms.bias[i / 4][i % 4]) - level[query_of<KEYS>(i)].lse;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    score[i / 4][i % 4] = terms.hidden >> i & 1 ? -kInfinity : score[i / 4][i % 4];
  }
}

// Products become P = exp((S - lse) - low), whose exponents are kept.
template <typename T, bool KEYS>
__device__ __forceinline__ void make_probabilities(float (&score)[2][4], float (&exponent)[2][4],
                                                   const GroupTerms& terms,
                                                   const Level (&level)[kQueries<KEYS>],
                                                   float scale) {
  subtract_lse<KEYS>(score, terms, level, scale);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float t = fmaf(score[i / 4][i % 4], kUnitsOfOne<T>, -level[query_of<KEYS>(i)].low);
    exponent[i / 4][i % 4] = t;
    score[i / 4][i % 4] = power<T>(t);
  }
}

// Where the tokens of one image are.
struct HeadPositions {
  bool given = false;
  const float* data = nullptr;
  int64_t stride = 0;
  int dims = 0;
  int first = 0;  // token that lies anywhere
  int last = 0;

  __device__ __forceinline__ HeadPositions(const Positions& positions, int b, int tokens)
      : given(positions.given),
        stride(positions.stride_token),
        dims(positions.first < tokens ? positions.dims : 0),  // none where all tokens are prefix
        first(static_cast<int>(positions.first)),
        last(tokens - 1) {
    if (given) {
      data = positions.data + b * positions.stride_batch;
    }
  }

  __device__ __forceinline__ float at(int token, int dim) const {
    return data[(max(min(token, last), first) - first) * stride + dim];
  }
};

// Euclidean distances between the queries and the keys of a lane's elements. Tokens before the
// first or beyond the last are where that one is.
template <bool KEYS>
__device__ __forceinline__ void load_distances(float (&d)[2][4], const HeadPositions& positions,
                                               int first_row, int first_column) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    d[i / 4][i % 4] = 0.0f;
  }
#pragma unroll 1
  for (int dim = 0; dim < positions.dims; ++dim) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int query, key;
      locate<KEYS>(first_row, first_column, i / 4, i % 4, query, key);
      const float step = positions.at(query, dim) - positions.at(key, dim);
      d[i / 4][i % 4] = fmaf(step, step, d[i / 4][i % 4]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    d[i / 4][i % 4] = sqrtf(d[i / 4][i % 4]);
  }
}

}  // namespace mimkernels::cuda

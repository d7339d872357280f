// From products to P and to the gradient of the scores, for the kernels of attention_bwd:
//   L = (S - lse) - lse_low,  P = exp(L),  dS = P (dP - delta + c(j) + a(j) L + [i = j] s + w d)
#pragma once

#include "cuda/attention/scores.cuh"

namespace mimkernels::cuda {

// The coefficients of upstream gradients of lse and statistics, a as a slope on the exponent of P.
struct Coefficients {
  float c_prefix, a_prefix;
  float c_patch, a_patch;
  float own, far;
};

template <typename T>
__device__ __forceinline__ Coefficients load_coefficients(const AttentionBwdParams& p, int head,
                                                          int query) {
  const AttentionScores& s = p.scores;
  if (query >= s.queries) {
    return {};
  }
  const int64_t place = head * s.queries + query;
  const int64_t plane = s.batch * s.heads * s.queries;
  const float* const coef = p.coef + place;
  return {coef[0],         coef[plane] * kOneUnit<T>,
          coef[2 * plane], coef[3 * plane] * kOneUnit<T>,
          coef[4 * plane], query >= p.num_prefix ? coef[5 * plane] : 0.0f};
}

// ds += c + a t + [i = j] s + w d.
template <typename T, bool KEYS>
__device__ __forceinline__ void add_coefficients(float (&ds)[2][4], const float (&exponent)[2][4],
                                                 const AttentionBwdParams& p,
                                                 const HeadPositions& positions, int head,
                                                 int first_row, int first_column) {
  Coefficients of[kQueries<KEYS>];
#pragma unroll
  for (int n = 0; n < kQueries<KEYS>; ++n) {
    of[n] = load_coefficients<T>(p, head, query_token<KEYS>(first_row, first_column, n));
  }
  const int prefix = static_cast<int>(p.num_prefix);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int query, key;
    locate<KEYS>(first_row, first_column, i / 4, i % 4, query, key);
    const Coefficients& terms = of[query_of<KEYS>(i)];
    const float t = fmaxf(exponent[i / 4][i % 4], kLeastExponent);
    ds[i / 4][i % 4] += fmaf(key < prefix ? terms.a_prefix : terms.a_patch, t,
                             key < prefix ? terms.c_prefix : terms.c_patch) +
                        (query == key ? terms.own : 0.0f);
  }
  if (!positions.given) {
    return;
  }
  float d[2][4];
  load_distances<KEYS>(d, positions, first_row, first_column);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int query, key;
    locate<KEYS>(first_row, first_column, i / 4, i % 4, query, key);
    ds[i / 4][i % 4] += key < prefix ? 0.0f : of[query_of<KEYS>(i)].far * d[i / 4][i % 4];
  }
}

// score: q k products, which become P. ds: dO v products, which become dS. KEYS: rows of the group
// are keys. level and delta are those of the lane's queries.
// delta_error += P (dP - delta), for rows of queries, where it sums to 0 but for the rounding of
// out.
template <typename T, bool KEYS>
__device__ __forceinline__ void score_gradient(float (&score)[2][4], float (&ds)[2][4],
                                               float (&delta_error)[2], const AttentionBwdParams& p,
                                               const GroupTerms& group,
                                               const Level (&level)[kQueries<KEYS>],
                                               const float (&delta)[kQueries<KEYS>],
                                               const HeadPositions& positions, int head,
                                               int first_row, int first_column) {
  float exponent[2][4];
  make_probabilities<T, KEYS>(score, exponent, group, level, p.scores.scale);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    ds[i / 4][i % 4] -= delta[query_of<KEYS>(i)];
    if constexpr (sizeof(T) == 4) {
      // One key has all the attention whatever its score: no rounding error may be left here.
      ds[i / 4][i % 4] = p.scores.keys == 1 ? 0.0f : ds[i / 4][i % 4];
    }
    if constexpr (!KEYS) {
      float& error = delta_error[query_of<KEYS>(i)];
      error = fmaf(score[i / 4][i % 4], ds[i / 4][i % 4], error);
    }
  }
  if (p.has_coef) {
    add_coefficients<T, KEYS>(ds, exponent, p, positions, head, first_row, first_column);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    ds[i / 4][i % 4] *= score[i / 4][i % 4];
  }
}

// Gradients of the strip's rows of q or k, in shared memory, from products of dS, which take the
// length in a row's `factor` for a constant: without what of them lies along the row, unless that is
// too short to count.
template <typename T, int TILES>
__device__ __forceinline__ void make_tangents(float (&acc)[TILES][4], const T* strip, int stride,
                                              const float (&factor)[2]) {
  const T* const rows = strip + threadIdx.x % kWarp / 4 * stride;
  const auto element = [&](int n, int e) {
    return to_float(rows[e / 2 * 8 * stride + feature_of<T>(n) + e % 2]);
  };
  __syncwarp();
  float square[2] = {};
  float radial[2] = {};
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = element(n, e);
      acc[n][e] *= factor[e / 2];
      square[e / 2] = fmaf(x, x, square[e / 2]);
      radial[e / 2] = fmaf(x, acc[n][e], radial[e / 2]);
    }
  }
  float part[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    square[half] = add_quad(square[half]);
    radial[half] = add_quad(radial[half]);
    const bool is_short = square[half] < kLeastLength * kLeastLength;
    part[half] = is_short ? 0.0f : radial[half] / square[half];
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      acc[n][e] = fmaf(-part[e / 2], element(n, e), acc[n][e]);
    }
  }
}

// Stores a lane's elements of dS where query and key exist; rows are queries.
template <typename T>
__device__ __forceinline__ void store_dbias(void* to, bool is_float, const AttentionScores& s,
                                            int64_t first, int first_row, int first_column,
                                            const float (&ds)[2][4]) {
  const auto store = [&](auto type) {
    using Bias = decltype(type);
    Bias* const dbias = static_cast<Bias*>(to) + first;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int query, key;
      locate<false>(first_row, first_column, i / 4, i % 4, query, key);
      if (query < s.queries && key < s.keys) {
        dbias[query * s.keys + key] = from_float<Bias>(ds[i / 4][i % 4]);
      }
    }
  };
  if (is_float) {
    store(float{});
  } else {
    store(T{});
  }
}

}  // namespace mimkernels::cuda

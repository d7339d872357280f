// What the forward and the backward of the masked feature loss share: a row of predictions beside
// its target.
#pragma once

#include <limits>

#include "cuda/rows.cuh"
#include "ops/masked_feature_loss/cuda.h"

namespace mimkernels::cuda {

// Words of each row that one thread has in flight.
constexpr int kFeatureBatch = 4;

// Where the target of row i lies; false where its id names no token.
__device__ __forceinline__ bool find_target(const MaskedFeatureLossParams& p, int64_t i,
                                            TokenPlace& place) {
  place.image = divide(i, p.length, place.token);
  if (!p.ids.given) {
    return true;
  }
  const int64_t id = __ldg(p.ids.data + place.image * p.ids.stride1 + place.token);
  if (p.batch == p.images) {
    place.token = id;
    return id >= 0 && id < p.tokens;
  }
  if (id < 0 || id >= p.images * p.tokens) {
    return false;
  }
  place.image = divide(id, p.tokens, place.token);
  return true;
}

template <typename T>
__device__ __forceinline__ const T* pred_row(const MaskedFeatureLossParams& p, int64_t i) {
  int64_t j;
  const int64_t a = divide(i, p.length, j);
  return row_at<T>(p.pred, a, j);
}

template <typename T, int VEC>
__device__ __forceinline__ void unpack(float (&out)[VEC], Word<T, VEC> word) {
  T elements[VEC];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    out[e] = to_float(elements[e]);
  }
}

// body(word, values) for this lane's words of a row.
template <typename U, int VEC, typename Body>
__device__ __forceinline__ void for_each_word(const U* row, int words, const Body& body) {
  const Word<U, VEC>* const from = reinterpret_cast<const Word<U, VEC>*>(row);
  for (int first = threadIdx.x % kWarp; first < words; first += kWarp * kFeatureBatch) {
    Word<U, VEC> batch[kFeatureBatch];
#pragma unroll
    for (int k = 0; k < kFeatureBatch; ++k) {
      const int v = first + k * kWarp;
      batch[k] = v < words ? __ldg(from + v) : Word<U, VEC>{};
    }
#pragma unroll
    for (int k = 0; k < kFeatureBatch; ++k) {
      const int v = first + k * kWarp;
      if (v < words) {
        float values[VEC];
        unpack<U, VEC>(values, batch[k]);
        body(values);
      }
    }
  }
}

// The mean of a row, and 1 / sqrt(variance + eps).
struct RowNormal {
  float mean = 0.0f;
  float rstd = 1.0f;

  __device__ __forceinline__ float operator()(float x) const { return (x - mean) * rstd; }
};

// Means of a row's deviations from `center` and of their squares, in every lane.
template <typename U, int VEC>
__device__ __forceinline__ float2 moments_about(const U* row, int words, float center,
                                                float count) {
  float first = 0.0f;
  float second = 0.0f;
  for_each_word<U, VEC>(row, words, [&](const float (&values)[VEC]) {
    float sum = 0.0f;
    float squares = 0.0f;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const float deviation = values[e] - center;
      sum += deviation;
      squares += deviation * deviation;
    }
    first += sum;
    second += squares;
  });
  return {warp_sum(first) / count, warp_sum(second) / count};
}

template <typename U, int VEC>
__device__ __forceinline__ RowNormal normal_of(const MaskedFeatureLossParams& p, const U* row,
                                               int words) {
  RowNormal normal;
  if (!p.layer_norm) {
    return normal;
  }
  // About 0, where most rows have their mean nearly. Elsewhere squares about it say little, and
  // those of huge numbers nothing.
  const float count = static_cast<float>(p.dim > 0 ? p.dim : 1);
  float center = 0.0f;
  float2 about = moments_about<U, VEC>(row, words, center, count);
  for (int i = 0; i < 2 && (about.x * about.x * 64.0f > about.y || !(about.y < 1e30f)); ++i) {
    center += about.x;
    about = moments_about<U, VEC>(row, words, center, count);
  }
  const float variance = about.y - about.x * about.x;
  normal.mean = center + about.x;
  normal.rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + p.eps);
  return normal;
}

// body(word, pred, target) for this lane's words of a row of predictions and its target.
template <typename T, typename U, int VEC, typename Body>
__device__ __forceinline__ void for_each_pair(const T* pred, const U* target, int words,
                                              const RowNormal& normal, const Body& body) {
  const Word<T, VEC>* const preds = reinterpret_cast<const Word<T, VEC>*>(pred);
  const Word<U, VEC>* const targets = reinterpret_cast<const Word<U, VEC>*>(target);
  for (int first = threadIdx.x % kWarp; first < words; first += kWarp * kFeatureBatch) {
    Word<T, VEC> a[kFeatureBatch];
    Word<U, VEC> b[kFeatureBatch];
#pragma unroll
    for (int k = 0; k < kFeatureBatch; ++k) {
      const int v = first + k * kWarp;
      a[k] = v < words ? __ldg(preds + v) : Word<T, VEC>{};
      b[k] = v < words ? __ldg(targets + v) : Word<U, VEC>{};
    }
#pragma unroll
    for (int k = 0; k < kFeatureBatch; ++k) {
      const int v = first + k * kWarp;
      if (v < words) {
        float x[VEC];
        float t[VEC];
        unpack<T, VEC>(x, a[k]);
        unpack<U, VEC>(t, b[k]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          t[e] = normal(t[e]);
        }
        body(v, x, t);
      }
    }
  }
}

// Sums of the products of a row of predictions and its target, in every lane.
struct Products {
  float pred_pred = 0.0f;
  float target_target = 0.0f;
  float pred_target = 0.0f;
};

template <typename T, typename U, int VEC>
__device__ __forceinline__ Products products_of(const T* pred, const U* target, int words,
                                                const RowNormal& normal) {
  Products sums;
  for_each_pair<T, U, VEC>(pred, target, words, normal,
                           [&](int, const float (&x)[VEC], const float (&t)[VEC]) {
                             Products part;
#pragma unroll
                             for (int e = 0; e < VEC; ++e) {
                               part.pred_pred += x[e] * x[e];
                               part.target_target += t[e] * t[e];
                               part.pred_target += x[e] * t[e];
                             }
                             sums.pred_pred += part.pred_pred;
                             sums.target_target += part.target_target;
                             sums.pred_target += part.pred_target;
                           });
  return {warp_sum(sums.pred_pred), warp_sum(sums.target_target), warp_sum(sums.pred_target)};
}

// 1 over the length of a vector, by its square.
__device__ __forceinline__ float inverse_length(float square) {
  return 1.0f / sqrtf(square < kLeastSquare ? kLeastSquare : square);
}

inline bool fits(const MaskedFeatureLossParams& p) {
  return p.dim <= std::numeric_limits<int>::max();
}

// Calls body(T{}, U{}, vec) with the types of pred and target and the elements of a word.
template <typename Body>
cudaError_t with_feature_types(const MaskedFeatureLossParams& p, const Body& body) {
  return with_float_type(p.dtype, [&](auto pred) {
    return with_float_type(p.target_dtype, [&](auto target) {
      constexpr int64_t kPred = sizeof(pred);
      constexpr int64_t kTarget = sizeof(target);
      constexpr int kVec = 16 / static_cast<int>(kPred > kTarget ? kPred : kTarget);
      const bool aligned =
          p.dim % kVec == 0 && rows_aligned(p.dpred, 0, 0, kPred, kVec * kPred) &&
          rows_aligned(p.pred.data, p.pred.stride0, p.pred.stride1, kPred, kVec * kPred) &&
          rows_aligned(p.target.data, p.target.stride0, p.target.stride1, kTarget, kVec * kTarget);
      return aligned ? body(pred, target, std::integral_constant<int, kVec>{})
                     : body(pred, target, std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace mimkernels::cuda

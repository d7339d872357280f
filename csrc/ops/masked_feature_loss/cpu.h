// What the forward and the backward of the masked feature loss share: the target of one row.
#pragma once

#include "cpu/row_statistics.h"
#include "ops/masked_feature_loss/params.h"

namespace mimkernels::MIMKERNELS_ISA {

using LossKind = FeatureLossKind;

MIMKERNELS_INLINE Status check_feature_ids(const MaskedFeatureLossParams& p) {
  if (!p.ids.given) return Status{};
  const int64_t limit = p.batch == p.images ? p.tokens : p.images * p.tokens;
  return check_ids(p.ids, 1, p.batch, p.length, limit);
}

// Where the target of row i of A * R lies.
MIMKERNELS_INLINE TokenPlace place_of(const MaskedFeatureLossParams& p, int64_t i) {
  const int64_t a = i / p.length;
  const int64_t j = i % p.length;
  if (!p.ids.given) return {a, j};
  const int64_t id = p.ids.data[a * p.ids.stride1 + j];
  if (p.batch == p.images) return {a, id};
  return {id / p.tokens, id % p.tokens};
}

// The target of one row: (row - mean) * rstd.
struct FeatureTarget {
  const float* row;
  Pack16 mean;
  Pack16 rstd;

  template <bool kWhole>
  MIMKERNELS_INLINE Pack16 at(int64_t j, int64_t n) const {
    return (load_columns<16, kWhole>(row + j, n) - mean) * rstd;
  }
};

class FeatureTargets {
 public:
  explicit FeatureTargets(const MaskedFeatureLossParams& p)
      : p_(p), kept_(p.target_dtype == DType::kFloat32 ? 0 : p.dim) {}
  bool failed() const { return kept_.failed(); }

  // Of row i; the first lines of the next one are prefetched.
  FeatureTarget read(int64_t i, int64_t end) {
    const int64_t next = i + 1 < end ? i + 1 : i;
    switch (p_.target_dtype) {
      case DType::kBFloat16:
        return widened<bf16>(i, next);
      case DType::kFloat16:
        return widened<fp16>(i, next);
      default:
        prefetch_next<float>(next);
        return normalised(row_of<float>(i));
    }
  }

 private:
  template <typename U>
  MIMKERNELS_INLINE const U* row_of(int64_t i) const {
    const TokenPlace place = place_of(p_, i);
    return row_at<U>(p_.target, place.image, place.token);
  }

  template <typename U>
  MIMKERNELS_INLINE void prefetch_next(int64_t next) const {
    prefetch_row(row_of<U>(next), p_.dim * static_cast<int64_t>(sizeof(U)), kRowHead);
  }

  template <typename U>
  __attribute__((noinline)) FeatureTarget widened(int64_t i, int64_t next) {
    prefetch_next<U>(next);
    set_acc(kept_.get(), row_of<U>(i), p_.dim);
    return normalised(kept_.get());
  }

  __attribute__((noinline)) FeatureTarget normalised(const float* row) const {
    Statistics of = {0.0f, 1.0f};
    if (p_.layer_norm) {
      // About 0, where most rows have their mean nearly: one pass in place of two.
      const float count = static_cast<float>(max_of(1, p_.dim));
      const Moments about = moments_about(row, 0.0f, p_.dim, count);
      const bool good = !cancels(about) && about.second < kLargeSquare;
      of = good ? statistics_of(about, 0.0f, p_.eps)
                : statistics_of(row, about.first * count, p_.eps, p_.dim);
    }
    return {row, broadcast<16>(of.mean), broadcast<16>(of.rstd)};
  }

  static constexpr float kLargeSquare = 1e30f;

  const MaskedFeatureLossParams& p_;
  Scratch<float> kept_;
};

// Sums of the products of a row of predictions and its target.
struct Products {
  float pred_pred;
  float target_target;
  float pred_target;
};

template <typename T>
MIMKERNELS_INLINE Products products_of(const T* pred, const FeatureTarget& target, int64_t n) {
  Pack16 sums[3];
  for (Pack16& sum : sums) sum = broadcast<16>(0.0f);
  const auto add = [&](const Pack16& p, const Pack16& t) MIMKERNELS_LAMBDA_INLINE {
    sums[0] = sums[0] + p * p;
    sums[1] = sums[1] + t * t;
    sums[2] = sums[2] + p * t;
  };
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) add(load<16>(pred + j), target.at<true>(j, 16));
  if (j < n) {
    const int64_t rest = n - j;
    add(load_some<16>(pred + j, rest), keep_first(target.at<false>(j, rest), rest));
  }
  return {sum_lanes(sums[0]), sum_lanes(sums[1]), sum_lanes(sums[2])};
}

// 1 over the length of a vector, by its square.
MIMKERNELS_INLINE float inverse_length(float square) {
  return 1.0f / __builtin_sqrtf(square < kLeastSquare ? kLeastSquare : square);
}

// Calls body with the kind of loss as a compile-time constant.
template <LossKind kKind>
struct KindConstant {
  static constexpr LossKind value = kKind;
};

template <typename Body>
MIMKERNELS_INLINE void with_kind(const MaskedFeatureLossParams& p, const Body& body) {
  switch (p.kind) {
    case LossKind::kMse:
      return body(KindConstant<LossKind::kMse>{});
    case LossKind::kL1:
      return body(KindConstant<LossKind::kL1>{});
    case LossKind::kSmoothL1:
      return body(KindConstant<LossKind::kSmoothL1>{});
    case LossKind::kCosine:
      return body(KindConstant<LossKind::kCosine>{});
  }
}

template <typename T>
MIMKERNELS_INLINE const T* pred_row(const MaskedFeatureLossParams& p, int64_t i) {
  return row_at<T>(p.pred, i / p.length, i % p.length);
}

}  // namespace mimkernels::MIMKERNELS_ISA

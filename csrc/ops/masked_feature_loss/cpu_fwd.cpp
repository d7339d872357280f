// loss[i] = mean over D of kind(pred[i, :] - target), or 1 - the cosine of the two; target is the
// row of `target` that ids name, perhaps normalised by LayerNorm without gain and bias. Or the mean
// of those.
//
// in:       pred [A, R, D] and target [B, N, D] by strides, last dim contiguous, of any two float
//           types; ids int64 [A, R], or none for all tokens
// out:      fp32 [A, R], or one fp32 number
// numerics: fp32 in 16 and 32 lanes, fixed order; the variance from deviations about 0, or about
//           the mean where that is not small beside them; the sum over rows in double
// cost:     pred and the named rows of target read once; what is read again of a row is in the
//           first-level cache; a thread owns a range of rows
#include "cpu/kernels.h"
#include "ops/masked_feature_loss/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// Of smooth L1, beta times the loss: one division of the sum in place of one for each element.
template <LossKind kKind>
MIMKERNELS_INLINE Pack16 element_loss(const Pack16& d, const Pack16& beta) {
  if constexpr (kKind == LossKind::kMse) {
    return d * d;
  } else if constexpr (kKind == LossKind::kL1) {
    return abs(d);
  } else {
    const Pack16 size = abs(d);
    const Pack16 least = where_less(size, beta, size, beta);
    return least * (size - broadcast<16>(0.5f) * least);
  }
}

template <typename T, LossKind kKind>
float row_loss(const T* pred, const FeatureTarget& target, float beta, int64_t n) {
  if constexpr (kKind == LossKind::kCosine) {
    const Products of = products_of(pred, target, n);
    return 1.0f - of.pred_target * inverse_length(of.pred_pred) * inverse_length(of.target_target);
  } else {
    const Pack16 betas = broadcast<16>(beta);
    Pack16 sums[2];
    for (Pack16& sum : sums) sum = broadcast<16>(0.0f);
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
      MIMKERNELS_UNROLL
      for (int s = 0; s < 2; ++s) {
        const int64_t at = j + 16 * s;
        const Pack16 d = load<16>(pred + at) - target.at<true>(at, 16);
        sums[s] = sums[s] + element_loss<kKind>(d, betas);
      }
    }
    for (; j < n; j += 16) {
      const int64_t rest = min_of(16, n - j);
      const Pack16 d = load_some<16>(pred + j, rest) - target.at<false>(j, rest);
      sums[0] = sums[0] + keep_first(element_loss<kKind>(d, betas), rest);
    }
    const float sum = sum_lanes(sums[0] + sums[1]);
    return (kKind == LossKind::kSmoothL1 ? sum / beta : sum) / static_cast<float>(n);
  }
}

// In double and eight lanes: exact enough for any count, and the same on every instruction set.
float mean_of(const float* losses, int64_t n) {
  double sums[8] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % 8] += static_cast<double>(losses[i]);
  const double sum =
      ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  return static_cast<float>(sum / static_cast<double>(n));
}

}  // namespace

Status masked_feature_loss_fwd(const MaskedFeatureLossParams& p, ParallelFor parallel_for) {
  Status status = check_feature_ids(p);
  if (!status.ok()) return status;
  const int64_t rows = p.batch * p.length;
  Scratch<float> scratch(p.mean ? rows : 0);
  if (scratch.failed()) return out_of_memory();
  float* const losses = p.mean ? scratch.get() : p.loss;
  int failures = 0;
  status = with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t grain = grain_for(p.dim * static_cast<int64_t>(sizeof(T) + 4));
    with_kind(p, [&](auto kind) {
      run_parallel(parallel_for, rows, grain, [&](int64_t begin, int64_t end) {
        FeatureTargets targets(p);
        if (targets.failed()) {
          __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
          return;
        }
        for (int64_t i = begin; i < end; ++i) {
          losses[i] = row_loss<T, decltype(kind)::value>(pred_row<T>(p, i), targets.read(i, end),
                                                         p.beta, p.dim);
        }
      });
    });
    return Status{};
  });
  if (!status.ok()) return status;
  if (failures != 0) return out_of_memory();
  if (p.mean) p.loss[0] = mean_of(losses, rows);
  return Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

// dpred[i, :] = g * d kind(pred[i, :] - target) / d pred, g = grad / D, or g = grad of cosines, over
// the number of rows too if the loss is their mean.
//
// in:       grad fp32, one number or [A, R] by strides; the rest as in the forward
// out:      dpred [A, R, D] contiguous, of the type of pred; written once, past the cache when it
//           is large
// numerics: the target is computed again as in the forward; fp32, rounded once
// cost:     pred and the named rows of target read once, dpred written once
#include "cpu/kernels.h"
#include "ops/masked_feature_loss/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// Of smooth L1, beta times the slope. NaN passes through, but for that of L1, as in torch.
template <LossKind kKind>
MIMKERNELS_INLINE Pack16 element_slope(const Pack16& d, const Pack16& beta) {
  if constexpr (kKind == LossKind::kMse) {
    return d + d;
  } else if constexpr (kKind == LossKind::kL1) {
    return sign(d);
  } else {
    const Pack16 low = broadcast<16>(0.0f) - beta;
    const Pack16 raised = where_less(d, low, low, d);
    return where_less(beta, raised, beta, raised);
  }
}

// out[j] = body(pred, target) for every element.
template <bool kStream, typename T, typename Body>
MIMKERNELS_INLINE void write_row(T* out, const T* pred, const FeatureTarget& target, int64_t n,
                                 const Body& body) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    put<kStream>(out + j, body(load<16>(pred + j), target.at<true>(j, 16)));
  }
  if (j < n) {
    const int64_t rest = n - j;
    store_some<16>(out + j, body(load_some<16>(pred + j, rest), target.at<false>(j, rest)), rest);
  }
}

template <typename T, LossKind kKind, bool kStream>
void row_grad(T* out, const T* pred, const FeatureTarget& target, float grad, float beta,
              int64_t n) {
  if constexpr (kKind == LossKind::kCosine) {
    const Products of = products_of(pred, target, n);
    const float inverse = inverse_length(of.pred_pred);
    const float across = inverse * inverse_length(of.target_target);
    const bool clamped = of.pred_pred < kLeastSquare;  // then the length is a constant
    const float along = clamped ? 0.0f : of.pred_target * across * inverse * inverse;
    const Pack16 of_pred = broadcast<16>(grad * along);
    const Pack16 of_target = broadcast<16>(grad * across);
    write_row<kStream>(out, pred, target, n,
                       [&](const Pack16& p, const Pack16& t)
                           MIMKERNELS_LAMBDA_INLINE { return p * of_pred - t * of_target; });
  } else {
    const float share = grad / static_cast<float>(n);
    const Pack16 g = broadcast<16>(kKind == LossKind::kSmoothL1 ? share / beta : share);
    const Pack16 betas = broadcast<16>(beta);
    write_row<kStream>(out, pred, target, n,
                       [&](const Pack16& p, const Pack16& t) MIMKERNELS_LAMBDA_INLINE {
                         return element_slope<kKind>(p - t, betas) * g;
                       });
  }
}

}  // namespace

Status masked_feature_loss_bwd(const MaskedFeatureLossParams& p, ParallelFor parallel_for) {
  const Status status = check_feature_ids(p);
  if (!status.ok()) return status;
  const int64_t rows = p.batch * p.length;
  if (rows == 0 || p.dim == 0) return Status{};
  int failures = 0;
  const Status done = with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    T* const dpred = static_cast<T*>(p.dpred);
    const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
    const bool streams = may_stream(p.dpred, rows * row_bytes, row_bytes);
    with_kind(p, [&](auto kind) {
      constexpr LossKind kKind = decltype(kind)::value;
      const auto run = [&](auto stream) {
        constexpr bool kStream = decltype(stream)::value;
        run_parallel(parallel_for, rows, grain_for(3 * row_bytes), [&](int64_t begin, int64_t end) {
          FeatureTargets targets(p);
          if (targets.failed()) {
            __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
            return;
          }
          for (int64_t i = begin; i < end; ++i) {
            const float* const grads = p.grad + i / p.length * p.grad_strides[0];
            const float grad = p.mean ? p.grad[0] / static_cast<float>(rows)
                                      : grads[i % p.length * p.grad_strides[1]];
            row_grad<T, kKind, kStream>(dpred + i * p.dim, pred_row<T>(p, i), targets.read(i, end),
                                        grad, p.beta, p.dim);
          }
        });
      };
      if (streams) {
        run(std::true_type{});
      } else {
        run(std::false_type{});
      }
    });
    return Status{};
  });
  if (!done.ok()) return done;
  return failures != 0 ? out_of_memory() : Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

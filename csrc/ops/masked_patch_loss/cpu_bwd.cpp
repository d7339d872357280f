// dpred[b, j, :] = g * d kind(pred[b, j, :] - target) / d pred, g = grad / E, over the number of
// patches counted too if the loss is their mean; 0 where mask is false. Of a finer mask, elements of
// its true cells take the place of patches.
//
// in:       grad fp32, one number or [B, L] by strides; the rest as in the forward
// out:      dpred [B, L, E] contiguous, of the type of pred; written once, past the cache when it
//           is large
// numerics: the target is computed again as in the forward; fp32, rounded once
// cost:     pred and the pixels of counted patches read once, dpred written once
#include "cpu/kernels.h"
#include "ops/masked_patch_loss/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

template <LossKind kKind>
MIMKERNELS_INLINE Pack16 element_grad(const Pack16& d, const Pack16& beta, const Pack16& g) {
  if constexpr (kKind == LossKind::kMse) {
    return (d + d) * g;
  } else if constexpr (kKind == LossKind::kL1) {
    return sign(d) * g;
  } else {
    // Where |d| >= beta fails, d / beta: NaN passes through, as in torch.
    return where_less(beta, abs(d), sign(d), d / beta) * g;
  }
}

template <typename T, LossKind kKind, bool kStream, bool kCells>
bool grad_range(const MaskedPatchLossParams& p, float mean_grad, int64_t begin, int64_t end) {
  TargetReader reader(p);
  CountedElements counted(p);
  if (reader.failed() || counted.failed()) return false;
  const int64_t elements = reader.elements();
  const Pack16 beta = broadcast<16>(p.beta);
  T* const dpred = static_cast<T*>(p.dpred);
  for_each_patch(
      p, reader, begin, end,
      [&](int64_t i, int64_t next) {
        const T* const pred = pred_row<T>(p, i);
        T* const out = dpred + i * elements;
        const float* grads = p.grad + i / p.length * p.grad_strides[0];
        const float grad = p.mean ? mean_grad : grads[i % p.length * p.grad_strides[1]];
        int64_t count = elements;
        if constexpr (kCells) {
          counted.read(i);
          count = (p.mean ? 1 : count_cells(p, i)) * cell_elements(p);
        }
        const Pack16 g = broadcast<16>(grad / static_cast<float>(count));
        reader.visit<T>(i, next,
                        [&](int64_t at, const Pack16& target, int, auto whole, int64_t n)
                            MIMKERNELS_LAMBDA_INLINE {
                              constexpr bool kWhole = decltype(whole)::value;
                              const Pack16 d = load_columns<16, kWhole>(pred + at, n) - target;
                              Pack16 value = element_grad<kKind>(d, beta, g);
                              if constexpr (kCells) value = counted.only_counted(at, value);
                              store_columns<16, kWhole, kStream>(out + at, value, n);
                            });
      },
      [&](int64_t i) { zero_row<kStream>(dpred + i * elements, elements); });
  return true;
}

}  // namespace

Status masked_patch_loss_bwd(const MaskedPatchLossParams& p, ParallelFor parallel_for) {
  const Status status = check_loss_ids(p);
  if (!status.ok()) return status;
  const int64_t patches = p.grid.batch * p.length;
  const int64_t elements = layout_of(p.grid).elements;
  if (patches == 0 || elements == 0) return Status{};
  const float mean_grad = p.mean ? p.grad[0] / static_cast<float>(count_units(p)) : 0.0f;
  int failures = 0;
  const Status done = with_float_type(p.dtype, [&](auto pred) {
    using T = decltype(pred);
    const int64_t row_bytes = elements * static_cast<int64_t>(sizeof(T));
    const bool streams = may_stream(p.dpred, patches * row_bytes, row_bytes);
    with_kind(p, [&](auto kind) {
      constexpr LossKind kKind = decltype(kind)::value;
      const int64_t grain = p.local_norm > 0 ? 1 : grain_for(2 * row_bytes);
      run_parallel(parallel_for, count_parts(p), grain, [&](int64_t begin, int64_t end) {
        const bool good = has_cells(p) ? grad_range<T, kKind, false, true>(p, mean_grad, begin, end)
                          : streams ? grad_range<T, kKind, true, false>(p, mean_grad, begin, end)
                                    : grad_range<T, kKind, false, false>(p, mean_grad, begin, end);
        if (!good) __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
      });
    });
    return Status{};
  });
  if (!done.ok()) return done;
  return failures != 0 ? out_of_memory() : Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

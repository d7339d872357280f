// loss[b, j] = mean over the elements of kind(pred[b, j, :] - target), 0 where mask is false; or
// the sum of those over the number of patches counted. Of a finer mask, over the elements of its
// true cells.
//
// in:       pred [B, L, E] by strides, last dim contiguous; images [B, C, T, H, W] by strides, W
//           contiguous; ids int64 [B, L] or mask bool [B, L]
// out:      fp32 [B, L], or one fp32 number
// numerics: target, statistics (two passes, unbiased variance + 1e-6) and sums in fp32, 32 and 48
//           lanes, fixed order; the sum over patches in double, those of boxes of pixels too
// cost:     pred and the pixels of counted patches read once; the target of one patch lives in L1.
//           With local_norm, rows of pixels about four times, for the strip of a row of patches
#include "cpu/kernels.h"
#include "ops/masked_patch_loss/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

template <LossKind kKind>
MIMKERNELS_INLINE Pack16 element_loss(const Pack16& d, const Pack16& beta) {
  if constexpr (kKind == LossKind::kMse) {
    return d * d;
  } else if constexpr (kKind == LossKind::kL1) {
    return abs(d);
  } else {
    const Pack16 half = broadcast<16>(0.5f);
    const Pack16 size = abs(d);
    return where_less(size, beta, half * d * d / beta, size - half * beta);
  }
}

template <typename T, LossKind kKind, bool kCells>
bool loss_range(const MaskedPatchLossParams& p, float* losses, int64_t begin, int64_t end) {
  TargetReader reader(p);
  CountedElements elements(p);
  if (reader.failed() || elements.failed()) return false;
  const Pack16 beta = broadcast<16>(p.beta);
  for_each_patch(
      p, reader, begin, end,
      [&](int64_t i, int64_t next) {
        const T* const pred = pred_row<T>(p, i);
        Pack16 sums[TargetReader::kSums];
        for (Pack16& sum : sums) sum = broadcast<16>(0.0f);
        if constexpr (kCells) elements.read(i);
        reader.visit<T>(i, next,
                        [&](int64_t at, const Pack16& target, int s, auto whole, int64_t n)
                            MIMKERNELS_LAMBDA_INLINE {
                              constexpr bool kWhole = decltype(whole)::value;
                              const Pack16 d = load_columns<16, kWhole>(pred + at, n) - target;
                              Pack16 loss = element_loss<kKind>(d, beta);
                              if constexpr (kCells) loss = elements.only_counted(at, loss);
                              sums[s] = sums[s] + (kWhole ? loss : keep_first(loss, n));
                            });
        int64_t count = reader.elements();
        if constexpr (kCells) count = (p.mean ? 1 : count_cells(p, i)) * cell_elements(p);
        losses[i] = sum_lanes(sums[0] + sums[1] + sums[2]) / static_cast<float>(count);
      },
      [&](int64_t i) { losses[i] = 0.0f; });
  return true;
}

// In double and eight lanes: exact enough for any count, and the same on every instruction set.
float mean_loss(const float* losses, int64_t n, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) sums[l] += static_cast<double>(losses[i + l]);
  }
  for (; i < n; ++i) sums[i % 8] += static_cast<double>(losses[i]);
  const double sum =
      ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  return static_cast<float>(sum / static_cast<double>(count));
}

}  // namespace

Status masked_patch_loss_fwd(const MaskedPatchLossParams& p, ParallelFor parallel_for) {
  Status status = check_loss_ids(p);
  if (!status.ok()) return status;
  const int64_t patches = p.grid.batch * p.length;
  Scratch<float> scratch(p.mean ? patches : 0);
  if (scratch.failed()) return out_of_memory();
  float* losses = p.mean ? scratch.get() : p.loss;
  int failures = 0;
  status = with_float_type(p.dtype, [&](auto pred) {
    using T = decltype(pred);
    const int64_t bytes = layout_of(p.grid).elements * static_cast<int64_t>(sizeof(T) + 4);
    const int64_t grain = p.local_norm > 0 ? 1 : grain_for(bytes);
    with_kind(p, [&](auto kind) {
      constexpr LossKind kKind = decltype(kind)::value;
      run_parallel(parallel_for, count_parts(p), grain, [&](int64_t begin, int64_t end) {
        const bool good = has_cells(p) ? loss_range<T, kKind, true>(p, losses, begin, end)
                                       : loss_range<T, kKind, false>(p, losses, begin, end);
        if (!good) __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
      });
    });
    return Status{};
  });
  if (!status.ok()) return status;
  if (failures != 0) return out_of_memory();
  if (p.mean) p.loss[0] = mean_loss(losses, patches, count_units(p));
  return Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

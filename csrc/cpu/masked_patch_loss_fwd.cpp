// loss[b, j] = mean over the elements of kind(pred[b, j, :] - target), 0 where mask is false; or
// the sum of those over the number of patches counted.
//
// in:       pred [B, L, E] by strides, last dim contiguous; images [B, C, T, H, W] by strides, W
// contiguous;
//           ids int64 [B, L] or mask bool [B, L]
// out:      fp32 [B, L], or one fp32 number
// numerics: target, statistics (two passes, unbiased variance + 1e-6) and sums in fp32, 32 lanes,
// fixed order;
//           the sum over patches in double
// cost:     pred and the pixels of counted patches read once; the target of one patch lives in L1
#include "kernels.h"
#include "patch_loss.h"

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

template <LossKind kKind, typename T>
MIMKERNELS_INLINE float patch_loss(const T* pred, const T* next, const float* tile, int64_t n,
                                   float beta_value) {
  const Pack16 beta = broadcast<16>(beta_value);
  Pack16 sums[2] = {broadcast<16>(0.0f), broadcast<16>(0.0f)};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    prefetch(next + i);
    if (sizeof(T) == 4) prefetch(next + i + 16);
    const Pack16 a = load<16>(pred + i) - load<16>(tile + i);
    const Pack16 b = load<16>(pred + i + 16) - load<16>(tile + i + 16);
    sums[0] = sums[0] + element_loss<kKind>(a, beta);
    sums[1] = sums[1] + element_loss<kKind>(b, beta);
  }
  for (; i < n; i += 16) {
    const int64_t lanes = min_of(16, n - i);
    const Pack16 d = load_some<16>(pred + i, lanes) - load_some<16>(tile + i, lanes);
    sums[0] = sums[0] + keep_first(element_loss<kKind>(d, beta), lanes);
  }
  return sum_lanes(sums[0] + sums[1]) / static_cast<float>(n);
}

template <typename T, LossKind kKind>
bool loss_range(const MaskedPatchLossParams& p, float* losses, int64_t begin, int64_t end) {
  TargetReader reader(p);
  if (reader.failed()) return false;
  const int64_t n = reader.elements();
  for_each_patch(
      p, begin, end,
      [&](int64_t i, int64_t next) {
        const float* tile = reader.read(i, next);
        const T* pred = pred_row<T>(p, i);
        losses[i] =
            patch_loss<kKind>(pred, next < 0 ? pred : pred_row<T>(p, next), tile, n, p.beta);
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
    with_kind(p, [&](auto kind) {
      run_parallel(parallel_for, patches, grain_for(bytes), [&](int64_t begin, int64_t end) {
        if (!loss_range<T, decltype(kind)::value>(p, losses, begin, end)) {
          __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
        }
      });
    });
    return Status{};
  });
  if (!status.ok()) return status;
  if (failures != 0) return out_of_memory();
  if (p.mean) p.loss[0] = mean_loss(losses, patches, count_patches(p));
  return Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

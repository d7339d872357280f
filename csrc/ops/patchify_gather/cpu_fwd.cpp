// out[m * B + b, k, :] = the pixels of patch ids[m, b, k] of image b, in the order (c, t, h, w),
// times scale plus shift.
//
// in:       images [B, C, T, H, W] uint8 or float by strides, W contiguous; ids int64 [M, B, K] or
//           all patches
// out:      [M * B, K, C * pt * ph * pw] contiguous, of any float type; written once, past the
//           cache when large
// numerics: float(pixel) * scale[c] + shift[c] in fp32, rounded once
// cost:     the pixels of the chosen patches read once, out written once; a thread owns a range of
//           patches
#include "cpu/kernels.h"
#include "cpu/patches.h"
#include "ops/patchify_gather/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

template <typename Dst, typename Src, bool kStream>
void gather_range(const PatchifyGatherFwdParams& p, int64_t begin, int64_t end) {
  const PatchLayout layout = layout_of(p.grid);
  const auto source = [&](int64_t i) {
    const int64_t k = i % p.kept;
    const int64_t b = i / p.kept % p.grid.batch;
    const int64_t m = i / p.kept / p.grid.batch;
    const int64_t n = p.ids.given ? p.ids.data[m * p.ids.stride0 + b * p.ids.stride1 + k] : k;
    return static_cast<const Src*>(p.images.data) + patch_place(p.images, p.grid, layout, b, n);
  };
  const Src* patch = source(begin);
  for (int64_t i = begin; i < end; ++i) {
    const Src* next = i + 1 < end ? source(i + 1) : nullptr;
    read_patch<kStream>(static_cast<Dst*>(p.out) + i * layout.elements, patch, p.images, p.grid,
                        [&](int64_t at) MIMKERNELS_LAMBDA_INLINE {
                          if (next != nullptr) prefetch_pixels(next + at, p.grid.patch_w);
                        });
    patch = next;
  }
}

template <typename Dst, typename Src>
Status run(const PatchifyGatherFwdParams& p, ParallelFor parallel_for) {
  const int64_t row = layout_of(p.grid).elements * static_cast<int64_t>(sizeof(Dst));
  const int64_t count = p.masks * p.grid.batch * p.kept;
  if (row == 0) return Status{};
  const bool streams = p.grid.patch_w % 16 == 0 && may_stream(p.out, count * row, row);
  run_parallel(parallel_for, count, grain_for(2 * row), [&](int64_t begin, int64_t end) {
    if (streams) {
      gather_range<Dst, Src, true>(p, begin, end);
    } else {
      gather_range<Dst, Src, false>(p, begin, end);
    }
  });
  return Status{};
}

}  // namespace

Status patchify_gather_fwd(const PatchifyGatherFwdParams& p, ParallelFor parallel_for) {
  if (p.ids.given) {
    const Status status =
        check_ids(p.ids, p.masks, p.grid.batch, p.kept, layout_of(p.grid).patches);
    if (!status.ok()) return status;
  }
  return with_image_type(p.images.dtype, [&](auto src) {
    return with_float_type(
        p.out_dtype, [&](auto dst) { return run<decltype(dst), decltype(src)>(p, parallel_for); });
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

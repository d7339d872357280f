// dimages[b, c, t, h, w] = scale[c] * the sum of the gradients of the rows that this pixel went to;
// 0 if none.
//
// in:       grad [M * B, K, C * pt * ph * pw] by strides, last dim contiguous; ids int64 [M, B, K]
//           or all patches
// out:      dimages [B, C, T, H, W] contiguous; written once, past the cache when it is large
// numerics: sums in double in the order m, then k; times scale in fp32; rounded once
// cost:     grad read once, dimages written once in the order of memory; a thread owns rows of the
//           patch grid
#include "cpu/inverse.h"
#include "cpu/kernels.h"
#include "cpu/patches.h"
#include "ops/patchify_gather/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// One run of pixels of one patch from the rows in [entries, entries + count).
template <bool kStream, typename Dst, typename Src>
MIMKERNELS_INLINE void sum_run(Dst* dst, const Src* grad, const int64_t* entries, int64_t count,
                               int64_t n, PixelMap map) {
  if (count == 0) {
    if constexpr (kStream) {
      for (int64_t i = 0; i < n; i += 16) stream<16>(dst + i, broadcast<16>(0.0f));
    } else {
      zero_row<false>(dst, n);
    }
    return;
  }
  if (count == 1) {
    convert_pixels<kStream>(dst, grad + entries[0], n, map);
    return;
  }
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t lanes = min_of(16, n - i);
    alignas(64) double sums[16] = {};
    for (int64_t e = 0; e < count; ++e) add_to_sums(sums, grad + entries[e] + i, lanes);
    alignas(64) float sum[16];
    round_sums<false>(sum, sums, 16);
    store_some<16>(dst + i, load<16>(sum) * broadcast<16>(map.scale), lanes);
  }
}

// One row of the patch grid: every image row that it covers, from left to right.
template <typename Dst, typename Src, bool kStream>
void scatter_grid_row(const PatchifyGatherBwdParams& p, const PatchLayout& layout,
                      const int64_t* offsets, const int64_t* entries, int64_t b, int64_t grid_row) {
  const PatchGrid& g = p.grid;
  const int64_t frame = grid_row / layout.grid_h * g.patch_t;
  const int64_t row = grid_row % layout.grid_h * g.patch_h;
  const int64_t first = grid_row * layout.grid_w;
  const Src* grad = row_at<Src>(p.grad, b, 0);
  for (int64_t c = 0; c < g.channels; ++c) {
    PixelMap map;
    if (p.has_scale) map.scale = p.scale[c];
    for (int64_t t = 0; t < g.patch_t; ++t) {
      for (int64_t h = 0; h < g.patch_h; ++h) {
        Dst* dst = static_cast<Dst*>(p.dimages) +
                   (((b * g.channels + c) * g.frames + frame + t) * g.height + row + h) * g.width;
        const Src* run = grad + ((c * g.patch_t + t) * g.patch_h + h) * g.patch_w;
        for (int64_t w = 0; w < layout.grid_w; ++w, dst += g.patch_w) {
          if (offsets == nullptr) {
            const int64_t entry = (first + w) * p.grad.stride1;
            sum_run<kStream>(dst, run, &entry, 1, g.patch_w, map);
          } else {
            const int64_t* list = offsets + first + w;
            sum_run<kStream>(dst, run, entries + list[0], list[1] - list[0], g.patch_w, map);
          }
        }
      }
    }
  }
}

template <typename Dst, typename Src, bool kStream>
void scatter_range(const PatchifyGatherBwdParams& p, const Inverse& inverse, int64_t begin,
                   int64_t end) {
  const PatchLayout layout = layout_of(p.grid);
  const int64_t grid_rows = layout.grid_t * layout.grid_h;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / grid_rows;
    scatter_grid_row<Dst, Src, kStream>(p, layout, p.ids.given ? inverse.offsets(b) : nullptr,
                                        p.ids.given ? inverse.entries(b) : nullptr, b,
                                        task % grid_rows);
  }
}

template <typename Dst, typename Src>
Status run(const PatchifyGatherBwdParams& p, ParallelFor parallel_for) {
  const PatchLayout layout = layout_of(p.grid);
  const int64_t image_row = p.grid.width * static_cast<int64_t>(sizeof(Dst));
  const int64_t grid_rows = layout.grid_t * layout.grid_h;
  const int64_t grid_row_bytes = p.grid.patch_t * p.grid.patch_h * p.grid.channels * image_row;
  if (layout.patches == 0 || layout.elements == 0 || p.grid.batch == 0) return Status{};
  Inverse inverse(p.masks, p.ids.given ? p.grid.batch : 0, p.kept, layout.patches);
  if (inverse.failed()) return out_of_memory();
  if (p.ids.given) {
    inverse.build(parallel_for, p.ids, p.grid.batch, p.grid.batch * p.grad.stride0, p.grad.stride1);
  }
  const bool streams = p.grid.patch_w % 16 == 0 &&
                       may_stream(p.dimages, p.grid.batch * grid_rows * grid_row_bytes, image_row);
  run_parallel(parallel_for, p.grid.batch * grid_rows, grain_for(2 * grid_row_bytes),
               [&](int64_t begin, int64_t end) {
                 if (streams) {
                   scatter_range<Dst, Src, true>(p, inverse, begin, end);
                 } else {
                   scatter_range<Dst, Src, false>(p, inverse, begin, end);
                 }
               });
  return Status{};
}

}  // namespace

Status patchify_gather_bwd(const PatchifyGatherBwdParams& p, ParallelFor parallel_for) {
  if (p.ids.given) {
    const Status status =
        check_ids(p.ids, p.masks, p.grid.batch, p.kept, layout_of(p.grid).patches);
    if (!status.ok()) return status;
  }
  return with_float_type(p.grad_dtype, [&](auto src) {
    return with_float_type(
        p.out_dtype, [&](auto dst) { return run<decltype(dst), decltype(src)>(p, parallel_for); });
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

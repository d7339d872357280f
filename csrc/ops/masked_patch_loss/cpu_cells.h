// Which pixels of a patch count, where the mask is finer than the patches.
#pragma once

#include "cpu/patches.h"
#include "ops/masked_patch_loss/params.h"

namespace mimkernels::MIMKERNELS_ISA {

// The cells of the mask that lie in patch i of B * N.
MIMKERNELS_INLINE const uint8_t* cells_of(const MaskedPatchLossParams& p, int64_t i) {
  const int64_t columns = p.grid.width / p.grid.patch_w;
  const int64_t patch = i % p.length;
  return p.mask.data + i / p.length * p.mask.stride0 +
         patch / columns * p.cells_h * p.mask_stride_row + patch % columns * p.cells_w;
}

MIMKERNELS_INLINE int64_t count_cells(const MaskedPatchLossParams& p, int64_t i) {
  const uint8_t* cells = cells_of(p, i);
  int64_t count = 0;
  for (int64_t r = 0; r < p.cells_h; ++r) {
    for (int64_t c = 0; c < p.cells_w; ++c) count += cells[r * p.mask_stride_row + c] != 0;
  }
  return count;
}

MIMKERNELS_INLINE bool has_cells(const MaskedPatchLossParams& p) { return p.cells_h > 0; }

// Elements of pred in one cell.
MIMKERNELS_INLINE int64_t cell_elements(const MaskedPatchLossParams& p) {
  return p.grid.channels * p.grid.patch_t * (p.grid.patch_h / p.cells_h) *
         (p.grid.patch_w / p.cells_w);
}

// 1 for every element of a patch that counts, in the order of pred, and 0 for the others.
class CountedElements {
 public:
  explicit CountedElements(const MaskedPatchLossParams& p)
      : p_(p), elements_(has_cells(p) ? layout_of(p.grid).elements : 0), flags_(elements_ + 16) {}

  bool failed() const { return flags_.failed(); }

  // Of patch i.
  __attribute__((noinline)) void read(int64_t i) {
    if (elements_ == 0) return;
    const int64_t run = p_.channels_last ? p_.grid.channels : 1;
    const int64_t row = p_.grid.patch_w * run;
    const int64_t cell_rows = p_.grid.patch_h / p_.cells_h;
    const int64_t cell_row = p_.grid.patch_w / p_.cells_w * run;
    const uint8_t* cells = cells_of(p_, i);
    float* to = flags_.get();
    for (int64_t r = 0; r < p_.cells_h; ++r, cells += p_.mask_stride_row) {
      float* const first = to;
      for (int64_t c = 0; c < p_.cells_w; ++c) {
        const float flag = cells[c] != 0 ? 1.0f : 0.0f;
        for (int64_t e = 0; e < cell_row; ++e) *to++ = flag;
      }
      for (int64_t y = 1; y < cell_rows; ++y, to += row) copy_row<false>(to, first, row);
    }
    // The same for every frame, and for every channel whose plane lies on its own.
    for (const int64_t plane = p_.grid.patch_h * row; to < flags_.get() + elements_; to += plane) {
      copy_row<false>(to, flags_.get(), plane);
    }
  }

  // What counts of 16 elements from `at` on; zeros elsewhere.
  MIMKERNELS_INLINE Pack16 only_counted(int64_t at, const Pack16& values) const {
    const Pack16 zero = broadcast<16>(0.0f);
    return where_less(zero, load<16>(flags_.get() + at), values, zero);
  }

 private:
  const MaskedPatchLossParams& p_;
  int64_t elements_;
  Scratch<float> flags_;
};

}  // namespace mimkernels::MIMKERNELS_ISA

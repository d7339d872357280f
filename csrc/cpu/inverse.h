// The inverse of ids: for every token, the rows that were gathered from it.
#pragma once

#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Compressed lists per image, by a counting sort of its ids: token n of image b was gathered by
// entries(b)[offsets(b)[n]] to entries(b)[offsets(b)[n + 1] - 1], in the order m, then k. An entry
// is m * mask_step + k * kept_step: the place of the gathered row, in whatever unit the caller
// chose.
class Inverse {
 public:
  Inverse(int64_t masks, int64_t batch, int64_t kept, int64_t tokens)
      : masks_(masks),
        kept_(kept),
        tokens_(tokens),
        offsets_(batch, tokens + 1),
        entries_(masks * batch, kept) {}

  bool failed() const { return offsets_.failed() || entries_.failed(); }

  // Ids from `tokens` on are left out (they were never gathered).
  MIMKERNELS_INLINE void build(ParallelFor parallel_for, const Ids& ids, int64_t batch,
                               int64_t mask_step, int64_t kept_step) {
    const int64_t work = 16 * (masks_ * kept_ + tokens_ + 1);
    run_parallel(parallel_for, batch, grain_for(work), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) build_image(ids, b, mask_step, kept_step);
    });
  }

  const int64_t* offsets(int64_t b) const { return offsets_.get() + b * (tokens_ + 1); }
  const int64_t* entries(int64_t b) const { return entries_.get() + b * masks_ * kept_; }

 private:
  MIMKERNELS_INLINE void build_image(const Ids& ids, int64_t b, int64_t mask_step,
                                     int64_t kept_step) {
    int64_t* offsets = offsets_.get() + b * (tokens_ + 1);
    int64_t* entries = entries_.get() + b * masks_ * kept_;
    for (int64_t n = 0; n <= tokens_; ++n) offsets[n] = 0;
    for (int64_t m = 0; m < masks_; ++m) {
      const int64_t* row = ids.data + m * ids.stride0 + b * ids.stride1;
      for (int64_t k = 0; k < kept_; ++k) {
        if (row[k] < tokens_) ++offsets[row[k]];
      }
    }
    int64_t total = 0;
    for (int64_t n = 0; n <= tokens_; ++n) {
      const int64_t count = offsets[n];
      offsets[n] = total;
      total += count;
    }
    for (int64_t m = 0; m < masks_; ++m) {
      const int64_t* row = ids.data + m * ids.stride0 + b * ids.stride1;
      for (int64_t k = 0; k < kept_; ++k) {
        if (row[k] < tokens_) entries[offsets[row[k]]++] = m * mask_step + k * kept_step;
      }
    }
    // Filling moved every offset to its list's end, which is the next list's begin.
    for (int64_t n = tokens_; n > 0; --n) offsets[n] = offsets[n - 1];
    offsets[0] = 0;
  }

  int64_t masks_;
  int64_t kept_;
  int64_t tokens_;
  Scratch<int64_t> offsets_;
  Scratch<int64_t> entries_;
};

}  // namespace mimkernels::MIMKERNELS_ISA

// Targets whose pixels are normalised by a box around each: of one row of patches at a time.
#pragma once

#include "cpu/patches.h"
#include "ops/masked_patch_loss/params.h"

namespace mimkernels::MIMKERNELS_ISA {

// A row of patches of one image with all its channels and frames, normalised. The sums of pixels
// and of their squares over a box are added up in double and nothing is ever subtracted from them:
// squares cancel, and a pixel that is not finite must not be felt outside the boxes that hold it.
//
// Down a column: the rows of the strip's boxes are cut into runs of as many rows as a box has. A
// box is the end of one run and the beginning of the next, and both grow row by row. Along a row:
// sums over 1, 2, 4, ... neighbours, of which a box is a few.
class LocalStrip {
 public:
  explicit LocalStrip(const MaskedPatchLossParams& p)
      : p_(p),
        width_(p.grid.width),
        reach_(min_of(p.local_norm / 2, max_of(p.grid.height, p.grid.width))),
        box_(2 * reach_ + 1),
        ends_(min_of(box_, p.grid.patch_h)),
        padded_(width_ + box_ - 1),
        sums_(p.local_norm > 0 ? 2 * ends_ + 2 : 0, width_),
        lines_(p.local_norm > 0 ? 2 * padded_ + 3 * width_ : 0),
        row_(p.local_norm > 0 ? width_ : 0),
        pixels_(p.local_norm > 0 ? p.grid.channels * p.grid.patch_t * p.grid.patch_h : 0, width_) {
    if (p.local_norm == 0 || failed()) return;
    view_.data = pixels_.get();
    view_.stride_row = width_;
    view_.stride_frame = p.grid.patch_h * width_;
    view_.stride_channel = p.grid.patch_t * view_.stride_frame;
    double* count = counts();
    for (int64_t x = 0; x < width_; ++x) count[x] = static_cast<double>(inside(x, width_));
  }

  bool failed() const {
    return sums_.failed() || lines_.failed() || row_.failed() || pixels_.failed();
  }

  // The strip as images [1, C, T, H, W] of one row of patches.
  const Images& view() const { return view_; }

  // Row `row` of all rows of patches, of all frames, of image b.
  void fill(int64_t b, int64_t row) {
    switch (p_.images.dtype) {
      case DType::kFloat32:
        return fill_from<float>(b, row);
      case DType::kBFloat16:
        return fill_from<bf16>(b, row);
      case DType::kFloat16:
        return fill_from<fp16>(b, row);
      case DType::kUInt8:
        return fill_from<uint8_t>(b, row);
    }
  }

 private:
  // How many pixels of a box around place i lie inside [0, length).
  int64_t inside(int64_t i, int64_t length) const {
    return min_of(length - 1, i + reach_) - max_of(0, i - reach_) + 1;
  }

  double* counts() const { return lines_.get() + 2 * padded_ + 2 * width_; }

  template <typename Src>
  void fill_from(int64_t b, int64_t row) {
    const PatchGrid& grid = p_.grid;
    const int64_t rows = grid.height / grid.patch_h;
    for (int64_t c = 0; c < grid.channels; ++c) {
      for (int64_t t = 0; t < grid.patch_t; ++t) {
        const int64_t frame = row / rows * grid.patch_t + t;
        const Src* plane = static_cast<const Src*>(p_.images.data) + b * p_.images.stride_batch +
                           c * p_.images.stride_channel + frame * p_.images.stride_frame;
        float* out = pixels_.get() + c * view_.stride_channel + t * view_.stride_frame;
        fill_plane(plane, pixel_map(p_.images, c), row % rows * grid.patch_h, out);
      }
    }
  }

  // Rows [first, first + patch_h) of a plane.
  template <typename Src>
  void fill_plane(const Src* plane, PixelMap map, int64_t first, float* out) {
    const auto add_row = [&](double* sums, int64_t y) {
      convert_pixels<false>(row_.get(), plane + y * p_.images.stride_row, width_, map);
      add(sums, sums + width_, row_.get());
    };
    const int64_t size = 2 * width_;  // of a pair of sums
    double* const beginning = sums_.get() + ends_ * size;
    const int64_t top = first - reach_;  // the first row of the first box, perhaps above the image
    const int64_t last = p_.grid.height - 1 - top;
    for (int64_t run = 0; run < p_.grid.patch_h; run += box_) {
      const int64_t boxes = min_of(box_, p_.grid.patch_h - run);
      // The ends of this run, from the last row on: of what is never asked for only the sum.
      zero(beginning);
      for (int64_t j = min_of(run + box_ - 1, last); j >= run; --j) {
        if (top + j >= 0) add_row(beginning, top + j);
        if (j - run < boxes) {
          memcpy(sums_.get() + (j - run) * size, beginning,
                 static_cast<size_t>(size) * sizeof(double));
        }
      }
      zero(beginning);
      for (int64_t i = 0; i < boxes; ++i) {
        const int64_t y = first + run + i;
        const int64_t added = y + reach_;
        if (i > 0 && added < p_.grid.height) add_row(beginning, added);
        double* const ends = sums_.get() + i * size;
        for (int64_t x = 0; x < size; ++x) ends[x] += beginning[x];
        convert_pixels<false>(row_.get(), plane + y * p_.images.stride_row, width_, map);
        finish(ends, static_cast<double>(inside(y, p_.grid.height)), out + (run + i) * width_);
      }
    }
  }

  void zero(double* sums) const {
    memset(sums, 0, static_cast<size_t>(2 * width_) * sizeof(double));
  }

  __attribute__((noinline)) void add(double* __restrict sums, double* __restrict squares,
                                     const float* __restrict row) const {
    for (int64_t x = 0; x < width_; ++x) {
      const double pixel = static_cast<double>(row[x]);
      sums[x] += pixel;
      squares[x] += pixel * pixel;
    }
  }

  // row_ normalised by boxes of `rows` rows, of whose columns `sums` are the sums.
  void finish(const double* sums, double rows, float* out) {
    double* const box = lines_.get() + 2 * padded_;
    add_neighbours(sums, box);
    add_neighbours(sums + width_, box + width_);
    normalise(box, box + width_, counts(), rows, row_.get(), out);
  }

  // boxes[x] = the sum of columns [x - reach, x + reach].
  void add_neighbours(const double* columns, double* boxes) {
    double* now = lines_.get();
    double* next = now + padded_;
    for (int64_t x = 0; x < reach_; ++x) now[x] = now[x + reach_ + width_] = 0.0;
    memcpy(now + reach_, columns, static_cast<size_t>(width_) * sizeof(double));
    memset(boxes, 0, static_cast<size_t>(width_) * sizeof(double));
    int64_t done = 0;
    int64_t length = padded_;  // of the sums over `step` neighbours
    for (int64_t step = 1; step <= box_; step *= 2) {
      if (box_ & step) {
        accumulate(boxes, now + done, width_);
        done += step;
      }
      if (2 * step > box_) break;
      length -= step;
      add_pairs(next, now, now + step, length);
      double* const spent = now;
      now = next;
      next = spent;
    }
  }

  __attribute__((noinline)) static void accumulate(double* __restrict to,
                                                   const double* __restrict from, int64_t n) {
    for (int64_t x = 0; x < n; ++x) to[x] += from[x];
  }

  __attribute__((noinline)) static void add_pairs(double* __restrict to, const double* a,
                                                  const double* b, int64_t n) {
    for (int64_t x = 0; x < n; ++x) to[x] = a[x] + b[x];
  }

  // (pixel - mean) / sqrt(unbiased variance + 1e-6); a box of one pixel has variance 0.
  __attribute__((noinline)) void normalise(const double* __restrict sums,
                                           const double* __restrict squares,
                                           const double* __restrict columns, double rows,
                                           const float* __restrict row,
                                           float* __restrict out) const {
    for (int64_t x = 0; x < width_; ++x) {
      const double count = rows * columns[x];
      const double mean = sums[x] / count;
      const double rest = squares[x] - sums[x] * mean;
      const double others = count > 1.0 ? count - 1.0 : 1.0;
      // Not the other way round: NaN stays NaN.
      const double variance = (rest < 0.0 ? 0.0 : rest) / others;
      const double deviation = __builtin_sqrt(variance + 1e-6);
      out[x] = static_cast<float>((static_cast<double>(row[x]) - mean) / deviation);
    }
  }

  const MaskedPatchLossParams& p_;
  int64_t width_;
  int64_t reach_;  // of a box, to each side of its pixel
  int64_t box_;    // its side
  int64_t ends_;   // of a run, that are kept
  int64_t padded_;
  Scratch<double> sums_;   // [ends + 1, 2, W]
  Scratch<double> lines_;  // two of padded_, and the sums, squares and columns of the boxes
  Scratch<float> row_;
  Scratch<float> pixels_;
  Images view_;
};

}  // namespace mimkernels::MIMKERNELS_ISA

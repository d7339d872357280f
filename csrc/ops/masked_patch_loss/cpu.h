// What the forward and the backward of the masked patch loss share: the target of one patch.
#pragma once

#include "cpu/patches.h"
#include "ops/masked_patch_loss/cpu_cells.h"
#include "ops/masked_patch_loss/cpu_local.h"
#include "ops/masked_patch_loss/params.h"

namespace mimkernels::MIMKERNELS_ISA {

// The lines of the next patch's pixels, asked for one by one between the steps of the work on this
// one: all at once, they would be waited for.
class UpcomingLines {
 public:
  void open(const char* pixels, const int64_t* places, int64_t lines) {
    pixels_ = pixels;
    place_ = places;
    end_ = places + lines;
  }
  MIMKERNELS_INLINE void ask() {
    if (place_ < end_) prefetch(pixels_ + *place_++);
  }
  MIMKERNELS_INLINE void ask_all() {
    while (place_ < end_) ask();
  }

 private:
  const char* pixels_ = nullptr;
  const int64_t* place_ = nullptr;
  const int64_t* end_ = nullptr;
};

// Three runs of 16 pixels become 48 interleaved ones: r g b r g b ... First within each four
// lanes, where a fixed order of a channel's pixels puts each in place for every output.
MIMKERNELS_INLINE void interleave_three(const Pack16 (&planes)[3], Pack16 (&out)[3]) {
  using F = typename Pack16::Vec::F;
  using I = typename Pack16::Vec::I;
  constexpr int L = Pack16::kWidth;
  constexpr int kParts = Pack16::kParts;
  I order[3] = {};
  MIMKERNELS_UNROLL
  for (int l = 0; l < L; ++l) {
    const int four = l - l % 4;
    order[0][l] = four + (4 - l % 4) % 4;
    order[1][l] = four + (5 - l % 4) % 4;
    order[2][l] = four + (6 - l % 4) % 4;
  }
  MIMKERNELS_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const F r = __builtin_shuffle(planes[0].v[p], order[0]);
    const F g = __builtin_shuffle(planes[1].v[p], order[1]);
    const F b = __builtin_shuffle(planes[2].v[p], order[2]);
    F mixed[3];
    MIMKERNELS_UNROLL
    for (int q = 0; q < 3; ++q) {
      I from_rg = {};
      I from_b = {};
      MIMKERNELS_UNROLL
      for (int l = 0; l < L; ++l) {
        const int channel = (4 * q + l % 4) % 3;
        from_rg[l] = channel == 1 ? L + l : l;
        from_b[l] = channel == 2 ? L + l : l;
      }
      mixed[q] = __builtin_shuffle(__builtin_shuffle(r, g, from_rg), b, from_b);
    }
    // Then fours: number k of the result is number k / 3 of mixed[k % 3].
    MIMKERNELS_UNROLL
    for (int q = 0; q < 3; ++q) {
      I from_01 = {};
      I from_2 = {};
      MIMKERNELS_UNROLL
      for (int l = 0; l < L; ++l) {
        const int k = (q * L + l) / 4;
        const int lane = k / 3 * 4 + l % 4;
        from_01[l] = k % 3 == 2 ? l : k % 3 * L + lane;
        from_2[l] = k % 3 == 2 ? L + lane : l;
      }
      const int to = 3 * p + q;
      out[to / kParts].v[to % kParts] =
          __builtin_shuffle(__builtin_shuffle(mixed[0], mixed[1], from_01), mixed[2], from_2);
    }
  }
}

// The target of one patch: its pixels in the first-level cache and, normalised, a few registers at
// a time in the element order of the predictions.
class TargetReader {
 public:
  // Sums that a pass keeps apart: as many as registers are visited between two of the same number.
  static constexpr int kSums = 3;

  explicit TargetReader(const MaskedPatchLossParams& p)
      : p_(p),
        strip_(p),
        images_(p.local_norm > 0 ? strip_.view() : p.images),
        layout_(layout_of(p.grid)),
        pixel_bytes_(images_.dtype == DType::kUInt8     ? 1
                     : images_.dtype == DType::kFloat32 ? 4
                                                        : 2),
        lines_per_run_(ceil_div(p.grid.patch_w * pixel_bytes_, 64)),
        lines_(p.grid.channels * p.grid.patch_t * p.grid.patch_h * lines_per_run_),
        planes_(layout_.elements + kPadding),
        tile_(layout_.elements + kPadding),
        places_(lines_) {
    if (!failed()) find_lines();
  }

  bool failed() const {
    return strip_.failed() || planes_.failed() || tile_.failed() || places_.failed();
  }
  int64_t elements() const { return layout_.elements; }

  // With local_norm, patches are visited strip by strip: here begins row `row` of all rows of
  // patches of image b. Nothing is computed before one of its patches is visited.
  void open_strip(int64_t b, int64_t row) {
    strip_image_ = b;
    strip_row_ = row;
  }

  // Reads pred's patch i (of B * L) and asks for patch `next` and its predictions on the way,
  // unless that is negative. Then body(at, target, sum, whole, n) for its elements [at, at + n), n
  // = 16 if `whole` is true; `sum` counts 0, 1, 2, 0, ...
  template <typename T, typename Body>
  MIMKERNELS_INLINE void visit(int64_t i, int64_t next, const Body& body) {
    if (strip_row_ >= 0) {
      strip_.fill(strip_image_, strip_row_);
      strip_row_ = -1;
    }
    const int64_t place = i == next_ ? next_place_ : place_of(i);
    next_ = next;
    if (next >= 0) {
      next_place_ = place_of(next);
      upcoming_.open(static_cast<const char*>(images_.data) + pixel_bytes_ * next_place_,
                     places_.get(), lines_);
    }
    const int64_t row = next < 0 ? i : next;
    const T* const next_pred = row_at<T>(p_.pred, row / p_.length, row % p_.length);
    read(place);
    const Normal normal = p_.norm_pix ? statistics() : Normal{};
    const int64_t n = layout_.elements;
    const int64_t channels = p_.channels_last ? p_.grid.channels : 1;
    if (channels == 3) {
      visit_three(normal, next_pred, body);
    } else {
      if (channels > 1) interleave(channels);
      visit_row(channels > 1 ? tile_.get() : planes_.get(), 0, n, normal, next_pred, body);
    }
    upcoming_.ask_all();
  }

 private:
  static constexpr int64_t kStep = 16 * kSums;
  static constexpr int64_t kPadding = kStep;

  // The first pixel of pred's patch i, after that of the images.
  MIMKERNELS_INLINE int64_t place_of(int64_t i) const {
    const int64_t b = i / p_.length;
    const int64_t j = i % p_.length;
    const int64_t n = p_.mask.given ? j : p_.ids.data[b * p_.ids.stride1 + j];
    if (p_.local_norm > 0) return n % layout_.grid_w * p_.grid.patch_w;
    return patch_place(images_, p_.grid, layout_, b, n);
  }

  void find_lines() {
    int64_t* place = places_.get();
    for (int64_t c = 0; c < p_.grid.channels; ++c) {
      for (int64_t t = 0; t < p_.grid.patch_t; ++t) {
        for (int64_t h = 0; h < p_.grid.patch_h; ++h) {
          const int64_t run =
              c * images_.stride_channel + t * images_.stride_frame + h * images_.stride_row;
          for (int64_t l = 0; l < lines_per_run_; ++l) *place++ = run * pixel_bytes_ + 64 * l;
        }
      }
    }
  }

  void read(int64_t place) {
    switch (images_.dtype) {
      case DType::kFloat32:
        return read_as<float>(place);
      case DType::kBFloat16:
        return read_as<bf16>(place);
      case DType::kFloat16:
        return read_as<fp16>(place);
      case DType::kUInt8:
        return read_as<uint8_t>(place);
    }
  }

  // Planes first, as they lie in memory.
  template <typename Src>
  __attribute__((noinline)) void read_as(int64_t place) {
    const Src* patch = static_cast<const Src*>(images_.data) + place;
    UpcomingLines upcoming = upcoming_;
    int64_t run = 0;
    read_patch<false>(planes_.get(), patch, images_, p_.grid,
                      [&](int64_t) MIMKERNELS_LAMBDA_INLINE {
                        // Half of them where statistics() asks for the rest.
                        if (!p_.norm_pix || run % 2 == 0) upcoming.ask();
                        ++run;
                      });
    upcoming_ = upcoming;
  }

  // What a pixel is normalised with.
  struct Normal {
    float mean = 0.0f;
    float inverse_std = 1.0f;
    MIMKERNELS_INLINE Pack16 operator()(const Pack16& pixels) const {
      return (pixels - broadcast<16>(mean)) * broadcast<16>(inverse_std);
    }
  };

  // Two passes, 32 lanes at a time: the mean, and 1 / sqrt(variance + 1e-6). What is past the
  // planes' end is kept 0 for the sums.
  __attribute__((noinline)) Normal statistics() {
    UpcomingLines upcoming = upcoming_;
    const int64_t n = layout_.elements;
    float* planes = planes_.get();
    for (int64_t i = n; i < n + 16; ++i) planes[i] = 0.0f;
    const Pack16 zero = broadcast<16>(0.0f);
    Pack16 sums[2] = {zero, zero};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      sums[0] = sums[0] + load<16>(planes + i);
      sums[1] = sums[1] + load<16>(planes + i + 16);
    }
    for (; i < n; i += 16) sums[0] = sums[0] + load<16>(planes + i);
    const float average = sum_lanes(sums[0] + sums[1]) / static_cast<float>(n);
    const Pack16 mean = broadcast<16>(average);

    sums[0] = zero;
    sums[1] = zero;
    for (i = 0; i + 32 <= n; i += 32) {
      upcoming.ask();
      const Pack16 a = load<16>(planes + i) - mean;
      const Pack16 b = load<16>(planes + i + 16) - mean;
      sums[0] = sums[0] + a * a;
      sums[1] = sums[1] + b * b;
    }
    for (; i < n; i += 16) {
      const Pack16 a = keep_first(load<16>(planes + i) - mean, min_of(16, n - i));
      sums[0] = sums[0] + a * a;
    }
    const float variance = sum_lanes(sums[0] + sums[1]) / static_cast<float>(n - 1);
    upcoming_ = upcoming;
    return {average, 1.0f / __builtin_sqrtf(variance + 1e-6f)};
  }

  // (c, t, h, w) to (t, h, w, c) within the first-level cache, from pixel `first` on.
  __attribute__((noinline)) void interleave(int64_t channels, int64_t first = 0) {
    const int64_t n = layout_.elements / channels;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = first; i < n; ++i) {
        tile_.get()[i * channels + c] = planes_.get()[c * n + i];
      }
    }
  }

  template <typename T, typename Body>
  MIMKERNELS_INLINE void visit_three(const Normal& normal, const T* next_pred, const Body& body) {
    const int64_t n = layout_.elements / 3;
    const float* planes = planes_.get();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      Pack16 runs[3];
      MIMKERNELS_UNROLL
      for (int c = 0; c < 3; ++c) runs[c] = normal(load<16>(planes + c * n + i));
      Pack16 target[3];
      interleave_three(runs, target);
      MIMKERNELS_UNROLL
      for (int s = 0; s < kSums; ++s) {
        prefetch(next_pred + 3 * i + 16 * s);
        body(3 * i + 16 * s, target[s], s, std::true_type{}, int64_t{16});
      }
    }
    if (i == n) return;
    interleave(3, i);
    visit_row(tile_.get(), 3 * i, layout_.elements, normal, next_pred, body);
  }

  // Elements [first, end) of a row that is in order; first % kStep == 0.
  template <typename T, typename Body>
  MIMKERNELS_INLINE void visit_row(const float* row, int64_t first, int64_t end,
                                   const Normal& normal, const T* next_pred, const Body& body) {
    int64_t i = first;
    for (; i + kStep <= end; i += kStep) {
      MIMKERNELS_UNROLL
      for (int s = 0; s < kSums; ++s) {
        prefetch(next_pred + i + 16 * s);
        const Pack16 target = normal(load<16>(row + i + 16 * s));
        body(i + 16 * s, target, s, std::true_type{}, int64_t{16});
      }
    }
    for (int s = 0; i < end; ++s, i += 16) {
      const Pack16 target = normal(load<16>(row + i));
      body(i, target, s, std::false_type{}, min_of(16, end - i));
    }
  }

  const MaskedPatchLossParams& p_;
  LocalStrip strip_;
  const Images& images_;  // whose patches are read: those of the call, or the strip
  PatchLayout layout_;
  int64_t pixel_bytes_;
  int64_t lines_per_run_;
  int64_t lines_;
  Scratch<float> planes_;
  Scratch<float> tile_;
  Scratch<int64_t> places_;  // of the lines of a patch, in bytes after its first pixel
  UpcomingLines upcoming_;
  int64_t next_ = -1;  // the patch that was asked for, and its place
  int64_t next_place_ = 0;
  int64_t strip_image_ = 0;
  int64_t strip_row_ = -1;  // of the strip that is to be filled
};

// What a pass over the patches is divided into: single patches, or with local_norm strips, rows of
// patches of all frames of all images.
MIMKERNELS_INLINE int64_t count_parts(const MaskedPatchLossParams& p) {
  if (p.local_norm == 0) return p.grid.batch * p.length;
  const PatchLayout layout = layout_of(p.grid);
  return p.grid.batch * layout.grid_t * layout.grid_h;
}

// Patches of pred that are visited one after the other: of [begin, end), or of those the ones that
// lie in row `row` of all rows of patches.
struct PatchSpan {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t row = -1;
};

MIMKERNELS_INLINE PatchSpan strip_span(const MaskedPatchLossParams& p, int64_t b, int64_t row) {
  const int64_t columns = p.grid.width / p.grid.patch_w;
  const int64_t first = b * p.length;
  // Ids may name the patches of a row anywhere.
  if (!p.mask.given) return {first, first + p.length, row};
  return {first + row * columns, first + (row + 1) * columns, row};
}

MIMKERNELS_INLINE bool counts(const MaskedPatchLossParams& p, int64_t i, const PatchSpan& span) {
  if (has_cells(p)) return count_cells(p, i) > 0;
  const int64_t b = i / p.length;
  const int64_t j = i % p.length;
  if (p.mask.given) return p.mask.data[b * p.mask.stride0 + j] != 0;
  return span.row < 0 ||
         p.ids.data[b * p.ids.stride1 + j] / (p.grid.width / p.grid.patch_w) == span.row;
}

// counted(i, next) for every patch that counts in the parts [begin, end), `next` the one after it
// or -1; skipped(i) for those that the mask leaves out.
template <typename Counted, typename Skipped>
MIMKERNELS_INLINE void for_each_patch(const MaskedPatchLossParams& p, TargetReader& reader,
                                      int64_t begin, int64_t end, const Counted& counted,
                                      const Skipped& skipped) {
  const PatchLayout layout = layout_of(p.grid);
  const int64_t strips = layout.grid_t * layout.grid_h;  // of an image
  for (int64_t part = begin; part < end; ++part) {
    PatchSpan span = {begin, end, -1};
    if (p.local_norm > 0) {
      span = strip_span(p, part / strips, part % strips);
      reader.open_strip(part / strips, part % strips);
    }
    const auto find = [&](int64_t i) {
      for (; i < span.end && !counts(p, i, span); ++i) {
        if (p.mask.given) skipped(i);
      }
      return i;
    };
    for (int64_t i = find(span.begin); i < span.end;) {
      const int64_t next = find(i + 1);
      counted(i, next < span.end ? next : -1);
      i = next;
    }
    if (p.local_norm == 0) return;
  }
}

template <typename T>
MIMKERNELS_INLINE const T* pred_row(const MaskedPatchLossParams& p, int64_t i) {
  return row_at<T>(p.pred, i / p.length, i % p.length);
}

// What a mean is taken over: patches, or cells of a finer mask.
MIMKERNELS_INLINE int64_t count_units(const MaskedPatchLossParams& p) {
  if (!p.mask.given) return p.grid.batch * p.length;
  int64_t count = 0;
  if (has_cells(p)) {
    for (int64_t i = 0; i < p.grid.batch * p.length; ++i) count += count_cells(p, i);
    return count;
  }
  for (int64_t b = 0; b < p.grid.batch; ++b) {
    const uint8_t* mask = p.mask.data + b * p.mask.stride0;
    for (int64_t j = 0; j < p.length; ++j) count += mask[j] != 0;
  }
  return count;
}

MIMKERNELS_INLINE Status check_loss_ids(const MaskedPatchLossParams& p) {
  if (p.mask.given) return Status{};
  return check_ids(p.ids, 1, p.grid.batch, p.length, layout_of(p.grid).patches);
}

// Calls body with the kind of loss as a compile-time constant.
template <LossKind kKind>
struct KindConstant {
  static constexpr LossKind value = kKind;
};

template <typename Body>
MIMKERNELS_INLINE void with_kind(const MaskedPatchLossParams& p, const Body& body) {
  // smooth_l1 with beta 0 is l1, as torch has it.
  const bool is_l1 = p.kind == LossKind::kSmoothL1 && p.beta == 0.0f;
  switch (is_l1 ? LossKind::kL1 : p.kind) {
    case LossKind::kMse:
      return body(KindConstant<LossKind::kMse>{});
    case LossKind::kL1:
      return body(KindConstant<LossKind::kL1>{});
    case LossKind::kSmoothL1:
      return body(KindConstant<LossKind::kSmoothL1>{});
  }
}

}  // namespace mimkernels::MIMKERNELS_ISA

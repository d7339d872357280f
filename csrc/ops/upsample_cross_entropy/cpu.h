// What the forward and the backward of upsample_cross_entropy share: logits with the classes side
// by side, and a row of them at the height of a row of labels.
#pragma once

#include "cpu/attention/math.h"
#include "cpu/rows.h"
#include "ops/upsample_cross_entropy/params.h"
#include "ops/upsample_cross_entropy/places.h"

namespace mimkernels::MIMKERNELS_ISA {

// Classes in whole registers; what is beyond the last class repeats it.
MIMKERNELS_INLINE int64_t padded_classes(const UpsampleCrossEntropyParams& p) {
  return ceil_div(p.classes, kLanes) * kLanes;
}

MIMKERNELS_INLINE const int64_t* labels_of(const UpsampleCrossEntropyParams& p, int64_t b,
                                           int64_t y) {
  return p.labels + b * p.labels_strides[0] + y * p.labels_strides[1];
}

MIMKERNELS_INLINE float weight_of(const UpsampleCrossEntropyParams& p, int64_t label) {
  return p.has_weight ? p.weight[label] : 1.0f;
}

// Every label ignored or a class? Run before any output is written.
MIMKERNELS_INLINE Status check_labels(const UpsampleCrossEntropyParams& p) {
  Status status;
  const uint64_t end = static_cast<uint64_t>(p.classes);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t y = 0; y < p.height; ++y) {
      const int64_t* const row = labels_of(p, b, y);
      uint64_t bad = 0;
      for (int64_t x = 0; x < p.width; ++x) {
        bad |= static_cast<uint64_t>((static_cast<uint64_t>(row[x]) >= end) &
                                     (row[x] != p.ignore_index));
      }
      if (bad == 0) continue;
      for (int64_t x = 0; x < p.width; ++x) {
        if (static_cast<uint64_t>(row[x]) < end || row[x] == p.ignore_index) continue;
        status.code = StatusCode::kIdOutOfRange;
        status.position[0] = b;
        status.position[1] = y;
        status.position[2] = x;
        status.value = row[x];
        status.limit = p.classes;
        return status;
      }
    }
  }
  return status;
}

// The logits as fp32 [B, h, w, padded classes].
template <typename T>
void classes_last(const UpsampleCrossEntropyParams& p, ParallelFor parallel_for, float* out) {
  const int64_t padded = padded_classes(p);
  const int64_t row = p.source_w * padded;
  run_parallel(parallel_for, p.batch * p.source_h, grain_for(row * 8),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const T* const from = static_cast<const T*>(p.logits) +
                                         i / p.source_h * p.logits_strides[0] +
                                         i % p.source_h * p.logits_strides[2];
                   float* const to = out + i * row;
                   for (int64_t c = 0; c < padded; ++c) {
                     const T* const plane = from + min_of(c, p.classes - 1) * p.logits_strides[1];
                     for (int64_t x = 0; x < p.source_w; x += 16) {
                       const int64_t n = min_of(16, p.source_w - x);
                       alignas(64) float part[16];
                       store<16>(part, n == 16 ? load<16>(plane + x) : load_some<16>(plane + x, n));
                       for (int64_t l = 0; l < n; ++l) to[(x + l) * padded + c] = part[l];
                     }
                   }
                 }
               });
}

// Along the columns, for every row alike: the weight of the second logit of each label pixel, and
// the first pixel of each cell.
class Columns {
 public:
  explicit Columns(const UpsampleCrossEntropyParams& p)
      : weights_(p.width), firsts_(p.source_w + 1) {
    if (failed()) return;
    const Places places = places_of(p.source_w, p.width, p.align_corners);
    for (int64_t x = 0; x < p.width; ++x) weights_.get()[x] = second_weight(places, x);
    for (int64_t i = 0; i <= p.source_w; ++i) firsts_.get()[i] = first_of_cell(places, i);
  }
  bool failed() const { return weights_.failed() || firsts_.failed(); }
  float weight(int64_t x) const { return weights_.get()[x]; }
  int64_t first(int64_t cell) const { return firsts_.get()[cell]; }

 private:
  Scratch<float> weights_;
  Scratch<int64_t> firsts_;
};

// (1 - weight) * first + weight * second: as F.interpolate has it, infinity and NaN included.
MIMKERNELS_INLINE Floats between(Floats first, Floats second, Floats weight) {
  return mul_add(weight, second, (1.0f - weight) * first);
}

// Row y of the labels among the logits of image b: out [w, padded classes].
MIMKERNELS_INLINE void mix_rows(const UpsampleCrossEntropyParams& p, const Places& rows,
                                const float* logits, int64_t b, int64_t y, float* out) {
  const int64_t length = p.source_w * padded_classes(p);
  const int64_t cell = cell_of(rows, y);
  const float* const first = logits + (b * p.source_h + cell) * length;
  const float* const second = logits + (b * p.source_h + min_of(cell + 1, p.source_h - 1)) * length;
  const Floats weight = splat(second_weight(rows, y));
  for (int64_t i = 0; i < length; i += kLanes) {
    store_floats(out + i, between(load_floats(first + i), load_floats(second + i), weight));
  }
}

}  // namespace mimkernels::MIMKERNELS_ISA

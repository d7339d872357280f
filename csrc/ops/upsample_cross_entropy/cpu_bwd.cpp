// dlogits of the loss of upsample_cross_entropy. A label pixel's gradient
//   a * softmax - [c = label] * (1 - s) * weight[label] - s / C * weight[c], over totals[0],
// with a = (1 - s) * weight[label] + s / C * totals[1], goes to the four logits around it by their
// bilinear weights.
//
// in:       as in the forward, with its statistics and totals; grad [1]
// out:      dlogits [B, C, h, w] contiguous, of the type of logits; written once
// numerics: fp32: the sum over a cell's pixels of a row, then over rows, rounded once
// cost:     logits and gradients, twice, as fp32 with the classes side by side; a thread owns the
//           label rows between two rows of logits, and a row of each, w * C floats, in its caches
#include "cpu/kernels.h"
#include "ops/upsample_cross_entropy/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// A pixel of a cell.
struct CellPixel {
  float weight = 0.0f;   // of the second logit
  float largest = 0.0f;  // logit
  float scale = 0.0f;    // of exp(logit - largest)
};

// The scratch of a thread.
struct CellRow {
  explicit CellRow(const UpsampleCrossEntropyParams& p)
      : mixed(p.source_w, padded_classes(p)),
        sums(p.source_w, padded_classes(p)),
        spreads(p.source_w),
        pixels(p.width) {}
  bool failed() const {
    return mixed.failed() || sums.failed() || spreads.failed() || pixels.failed();
  }

  Scratch<float> mixed;       // [w, padded classes]: logits
  Scratch<float> sums;        // [w, padded classes]: their gradients
  Scratch<float> spreads;     // [w]: what smoothing takes from every class, times its weight
  Scratch<CellPixel> pixels;  // that count, of one cell
};

// sums of a row of labels.
void visit_row(const UpsampleCrossEntropyParams& p, const Columns& columns, CellRow& row,
               float grad, int64_t b, int64_t y) {
  const int64_t padded = padded_classes(p);
  const int64_t* const labels = labels_of(p, b, y);
  const float* const largest = p.statistics + (b * p.height + y) * p.width;
  const float* const exps = largest + p.batch * p.height * p.width;
  const float share = grad * p.smoothing / static_cast<float>(p.classes);
  float* const sums = row.sums.get();
  zero_row<false>(sums, p.source_w * padded);
  zero_row<false>(row.spreads.get(), p.source_w);
  for (int64_t cell = 0; cell < p.source_w; ++cell) {
    const int64_t next = min_of(cell + 1, p.source_w - 1);
    float* const first_sums = sums + cell * padded;
    float* const second_sums = sums + next * padded;
    int64_t count = 0;
    for (int64_t x = columns.first(cell); x < columns.first(cell + 1); ++x) {
      if (labels[x] == p.ignore_index) continue;
      const float weight = columns.weight(x);
      const float hard = grad * (1.0f - p.smoothing) * weight_of(p, labels[x]);
      CellPixel& pixel = row.pixels.get()[count++];
      pixel.weight = weight;
      pixel.largest = largest[x];
      pixel.scale = (hard + share * p.totals[1]) / exps[x];
      first_sums[labels[x]] -= (1.0f - weight) * hard;
      second_sums[labels[x]] -= weight * hard;
      row.spreads.get()[cell] += (1.0f - weight) * share;
      row.spreads.get()[next] += weight * share;
    }
    if (count == 0) continue;
    const float* const first = row.mixed.get() + cell * padded;
    const float* const second = row.mixed.get() + next * padded;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Floats a = load_floats(first + c);
      const Floats z = load_floats(second + c);
      Floats first_sum = splat(0.0f);
      Floats second_sum = splat(0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const CellPixel& pixel = row.pixels.get()[i];
        const Floats weight = splat(pixel.weight);
        const Floats logit = between(a, z, weight);
        const Floats slope = exp_lanes(logit - pixel.largest) * pixel.scale;
        first_sum = mul_add(1.0f - weight, slope, first_sum);
        second_sum = mul_add(weight, slope, second_sum);
      }
      store_floats(first_sums + c, load_floats(first_sums + c) + first_sum);
      store_floats(second_sums + c, load_floats(second_sums + c) + second_sum);
    }
  }
  if (p.smoothing == 0.0f) return;
  for (int64_t i = 0; i < p.source_w; ++i) {
    for (int64_t c = 0; c < p.classes; ++c) {
      sums[i * padded + c] -= row.spreads.get()[i] * weight_of(p, c);
    }
  }
}

// Row r of the gradient, of what the label rows after it gave and, unless null, those before it.
template <typename T>
void write_row(const UpsampleCrossEntropyParams& p, const float* after, const float* before,
               int64_t b, int64_t r) {
  const int64_t padded = padded_classes(p);
  for (int64_t c = 0; c < p.classes; ++c) {
    T* const to = static_cast<T*>(p.dlogits) + ((b * p.classes + c) * p.source_h + r) * p.source_w;
    for (int64_t x = 0; x < p.source_w; x += 16) {
      const int64_t n = min_of(16, p.source_w - x);
      alignas(64) float part[16] = {};
      for (int64_t l = 0; l < n; ++l) {
        const int64_t at = (x + l) * padded + c;
        part[l] = after[at] + (before == nullptr ? 0.0f : before[at]);
      }
      store_columns<16, false, false>(to + x, load<16>(part), n);
    }
  }
}

}  // namespace

Status upsample_cross_entropy_bwd(const UpsampleCrossEntropyParams& p, ParallelFor parallel_for) {
  const Status status = check_labels(p);
  if (!status.ok()) return status;
  const int64_t padded = padded_classes(p);
  const int64_t length = p.source_w * padded;
  const int64_t rows = p.batch * p.source_h;
  Scratch<float> logits(rows, length);
  Scratch<float> after(rows, length);   // to each row, of the label rows between it and the next
  Scratch<float> before(rows, length);  // to the next row, of the same
  const Columns columns(p);
  if (logits.failed() || after.failed() || before.failed() || columns.failed()) {
    return out_of_memory();
  }
  const float grad = p.grad[0] / p.totals[0];
  const Places places = places_of(p.source_h, p.height, p.align_corners);
  int failures = 0;
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    classes_last<T>(p, parallel_for, logits.get());
    run_parallel(parallel_for, rows, 1, [&](int64_t begin, int64_t end) {
      CellRow row(p);
      if (row.failed()) {
        __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p.source_h;
        const int64_t r = i % p.source_h;
        float* const to_this = after.get() + i * length;
        float* const to_next = r + 1 < p.source_h ? before.get() + i * length : to_this;
        zero_row<false>(to_this, length);
        zero_row<false>(to_next, length);
        for (int64_t y = first_of_cell(places, r); y < first_of_cell(places, r + 1); ++y) {
          mix_rows(p, places, logits.get(), b, y, row.mixed.get());
          visit_row(p, columns, row, grad, b, y);
          const Floats weight = splat(second_weight(places, y));
          for (int64_t j = 0; j < length; j += kLanes) {
            const Floats sum = load_floats(row.sums.get() + j);
            store_floats(to_this + j, mul_add(1.0f - weight, sum, load_floats(to_this + j)));
            store_floats(to_next + j, mul_add(weight, sum, load_floats(to_next + j)));
          }
        }
      }
    });
    if (failures != 0) return out_of_memory();
    run_parallel(parallel_for, rows, grain_for(length * 8), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i % p.source_h;
        write_row<T>(p, after.get() + i * length,
                     r == 0 ? nullptr : before.get() + (i - 1) * length, i / p.source_h, r);
      }
    });
    return Status{};
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

// loss = sum of weight[label] * ((1 - s) * (lse - logit[label]) + s * ...) over the sum of
// weight[label], of label pixels that are not ignored; s spreads over the classes what smoothing
// takes from the label: sum over c of weight[c] * (lse - logit[c]) / C.
//
// in:       logits [B, C, h, w] and labels int64 [B, H, W] by strides, last dim contiguous;
//           weight [C] fp32 or absent
// out:      loss [1], statistics [2, B, H, W], totals [2], all fp32; written once
// numerics: fp32; the softmax about the largest logit of each pixel; sums over pixels in double,
//           row by row, and over the rows in order
// cost:     the logits once as fp32 with the classes side by side; a thread owns rows of labels,
//           and has one row of logits at their height, w * C floats, in its caches
#include "cpu/kernels.h"
#include "ops/upsample_cross_entropy/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// The scratch of a thread.
struct PixelRow {
  explicit PixelRow(const UpsampleCrossEntropyParams& p)
      : mixed(p.source_w, padded_classes(p)),
        logits(padded_classes(p)),
        sums(ceil_div(p.width, kLanes) * kLanes),
        margins(p.width),
        spreads(p.width) {}
  bool failed() const {
    return mixed.failed() || logits.failed() || sums.failed() || margins.failed() ||
           spreads.failed();
  }

  Scratch<float> mixed;    // [w, padded classes]
  Scratch<float> logits;   // of one pixel
  Scratch<float> sums;     // of each pixel, then their logarithms
  Scratch<float> margins;  // largest logit - that of the label
  Scratch<float> spreads;  // sum of weight * (logit - largest)
};

// What a pixel adds; `weights` are padded with zeros, and null where nothing is smoothed.
MIMKERNELS_INLINE void visit_pixel(PixelRow& row, int64_t x, int64_t classes, const float* first,
                                   const float* second, float weight, const float* weights,
                                   int64_t label, float& largest, float& sum) {
  float* const z = row.logits.get();
  Floats top = splat(-kInfinity);
  for (int64_t c = 0; c < classes; c += kLanes) {
    const Floats value = between(load_floats(first + c), load_floats(second + c), splat(weight));
    store_floats(z + c, value);
    top = max_or_second(value, top);
  }
  largest = max_lanes(top);
  row.margins.get()[x] = largest - z[label];
  const Floats shift = splat(largest);
  Floats total = splat(0.0f);
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) total += exp_lanes(load_floats(z + c) - shift);
  if (c < classes) {
    const Floats rest = exp_lanes(load_floats(z + c) - shift);
    const Ints inside = lane_numbers(static_cast<int32_t>(c)) < static_cast<int32_t>(classes);
    total += choose_lanes(inside, rest, splat(0.0f));
  }
  sum = add_lanes(total);
  row.sums.get()[x] = sum;
  if (weights == nullptr) return;
  Floats spread = splat(0.0f);
  for (c = 0; c < classes; c += kLanes) {
    spread = mul_add(load_floats(weights + c), load_floats(z + c) - shift, spread);
  }
  row.spreads.get()[x] = add_lanes(spread);
}

// Sums of a row of labels: of the losses, and of the weights.
struct RowSums {
  double loss = 0.0;
  double weight = 0.0;
};

RowSums visit_row(const UpsampleCrossEntropyParams& p, const Columns& columns, PixelRow& row,
                  const float* weights, float total_weight, int64_t b, int64_t y) {
  const int64_t padded = padded_classes(p);
  const int64_t* const labels = labels_of(p, b, y);
  float* const largest = p.statistics + (b * p.height + y) * p.width;
  float* const sums = largest + p.batch * p.height * p.width;
  for (int64_t cell = 0; cell < p.source_w; ++cell) {
    const float* const first = row.mixed.get() + cell * padded;
    const float* const second = row.mixed.get() + min_of(cell + 1, p.source_w - 1) * padded;
    for (int64_t x = columns.first(cell); x < columns.first(cell + 1); ++x) {
      if (labels[x] == p.ignore_index) {
        largest[x] = 0.0f;
        sums[x] = 0.0f;
        row.sums.get()[x] = 1.0f;
        continue;
      }
      visit_pixel(row, x, p.classes, first, second, columns.weight(x), weights, labels[x],
                  largest[x], sums[x]);
    }
  }
  for (int64_t x = p.width; x % kLanes != 0; ++x) row.sums.get()[x] = 1.0f;
  float* const logs = row.sums.get();
  for (int64_t x = 0; x < p.width; x += kLanes) {
    store_floats(logs + x, log_lanes(load_floats(logs + x)));
  }
  RowSums out;
  const float share = p.smoothing / static_cast<float>(p.classes);
  for (int64_t x = 0; x < p.width; ++x) {
    if (labels[x] == p.ignore_index) continue;
    const float weight = weight_of(p, labels[x]);
    float loss = weight * (row.margins.get()[x] + logs[x]);
    if (weights != nullptr) {
      const float spread = total_weight * logs[x] - row.spreads.get()[x];
      loss = (1.0f - p.smoothing) * loss + share * spread;
    }
    out.loss += static_cast<double>(loss);
    out.weight += static_cast<double>(weight);
  }
  return out;
}

}  // namespace

Status upsample_cross_entropy_fwd(const UpsampleCrossEntropyParams& p, ParallelFor parallel_for) {
  const Status status = check_labels(p);
  if (!status.ok()) return status;
  const int64_t padded = padded_classes(p);
  const int64_t rows = p.batch * p.height;
  Scratch<float> logits(p.batch * p.source_h, p.source_w * padded);
  Scratch<float> weights(padded);
  Scratch<RowSums> partial(rows);
  const Columns columns(p);
  if (logits.failed() || weights.failed() || partial.failed() || columns.failed()) {
    return out_of_memory();
  }
  double total_weight = 0.0;
  for (int64_t c = 0; c < padded; ++c) {
    weights.get()[c] = c < p.classes ? weight_of(p, c) : 0.0f;
    total_weight += static_cast<double>(weights.get()[c]);
  }
  const float all_weights = static_cast<float>(total_weight);
  const float* const smoothed = p.smoothing > 0.0f ? weights.get() : nullptr;
  int failures = 0;
  const Status done = with_float_type(p.dtype, [&](auto type) {
    classes_last<decltype(type)>(p, parallel_for, logits.get());
    return Status{};
  });
  if (!done.ok()) return done;
  const Places places = places_of(p.source_h, p.height, p.align_corners);
  run_parallel(parallel_for, rows, grain_for(4 * p.width * padded),
               [&](int64_t begin, int64_t end) {
                 PixelRow row(p);
                 if (row.failed()) {
                   __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
                   return;
                 }
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t b = i / p.height;
                   const int64_t y = i % p.height;
                   mix_rows(p, places, logits.get(), b, y, row.mixed.get());
                   partial.get()[i] = visit_row(p, columns, row, smoothed, all_weights, b, y);
                 }
               });
  if (failures != 0) return out_of_memory();
  RowSums total;
  for (int64_t i = 0; i < rows; ++i) {
    total.loss += partial.get()[i].loss;
    total.weight += partial.get()[i].weight;
  }
  p.loss[0] = static_cast<float>(total.loss / total.weight);
  p.totals[0] = static_cast<float>(total.weight);
  p.totals[1] = all_weights;
  return Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

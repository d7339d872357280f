// Cosine attention: the factors that make scores of products of q and k, which stay as they are, and
// what normalised q and k mean for their gradients.
#pragma once

#include "cpu/attention/block.h"

namespace mimkernels::MIMKERNELS_ISA {

constexpr double kLargestLogitScale = 4.605170185988091;  // ln 100
constexpr double kLeastNorm = 1e-12;

// max(|x|, 1e-12). In double, as the factors are: an error of theirs is that of a whole row.
template <typename T>
MIMKERNELS_INLINE double norm_row(const T* x, int64_t dim) {
  double squares[kLanes] = {};
  for (int64_t c = 0; c < dim; c += kLanes) {
    const Floats value = load_columns(x + c, dim - c);
    add_lanes<kLanes>(squares, value * value);
  }
  double square = 0.0;
  for (int i = 0; i < kLanes; ++i) square += squares[i];
  const double norm = __builtin_sqrt(square);
  return norm < kLeastNorm ? kLeastNorm : norm;
}

// The factors of one head, the scale in those of its rows; those of keys that `allowed` switches
// off, and of the padding, are 0.
template <typename T>
MIMKERNELS_INLINE void fill_factors(const AttentionScores& s, int64_t b, int64_t h, float* rows,
                                    float* columns) {
  const double given = s.cosine.logit_scale[h];
  const double capped = given > kLargestLogitScale ? kLargestLogitScale : given;
  const double scale = s.scale * __builtin_exp(capped);
  for (int64_t i = 0; i < s.queries; ++i) {
    rows[i] = static_cast<float>(scale / norm_row(head_at<T>(s.q, b, h, i), s.dim));
  }
  const uint8_t* const allowed = mask_of(s.key_mask, b);
  for (int64_t j = 0; j < s.keys; ++j) {
    const bool there = allowed == nullptr || allowed[j] != 0;
    columns[j] = there ? static_cast<float>(1.0 / norm_row(head_at<T>(s.k, b, h, j), s.dim)) : 0.0f;
  }
  for (int64_t j = s.keys; j < padded_columns(s.keys); ++j) columns[j] = 0.0f;
}

// Calls run(params), whose scores have their factors and a scale of 1 if they are cosines.
template <typename T, typename Params, typename Run>
MIMKERNELS_INLINE Status with_factors(const Params& params, ParallelFor parallel_for,
                                      const Run& run) {
  const AttentionScores& s = params.scores;
  if (!s.cosine.given) return run(params);
  const int64_t heads = s.batch * s.heads;
  const int64_t stride = padded_columns(s.keys);
  Scratch<float> rows(heads, s.queries);
  Scratch<float> columns(heads, stride);
  if (rows.failed() || columns.failed()) return out_of_memory();
  run_parallel(parallel_for, heads, grain_for((s.queries + s.keys) * s.dim),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   fill_factors<T>(s, i / s.heads, i % s.heads, rows.get() + i * s.queries,
                                   columns.get() + i * stride);
                 }
               });
  Params made = params;
  made.scores.scale = 1.0f;
  made.scores.cosine.rows = rows.get();
  made.scores.cosine.columns = columns.get();
  made.scores.cosine.column_stride = stride;
  return run(made);
}

// The gradient of a row x of q or k from `grad`, which takes its norm for a constant: rounded, less
// what of it lies along x, unless the norm was too small to count. Returns x . grad.
template <typename T>
MIMKERNELS_INLINE float write_tangent(T* dst, const float* grad, const T* x, int64_t dim) {
  const float square = dot_row(x, x, dim);
  Floats sum = {};
  for (int64_t c = 0; c < dim; c += kLanes) {
    sum = mul_add(load_columns(x + c, dim - c), load_columns(grad + c, dim - c), sum);
  }
  const float along = add_lanes(sum);
  const bool counts = !(square < static_cast<float>(kLeastNorm * kLeastNorm));
  const Floats part = splat(counts ? along / square : 0.0f);
  for (int64_t c = 0; c < dim; c += kLanes) {
    const Floats value = load_floats(grad + c) - part * load_columns(x + c, dim - c);
    put_columns(dst + c, value, dim - c);
  }
  return along;
}

}  // namespace mimkernels::MIMKERNELS_ISA

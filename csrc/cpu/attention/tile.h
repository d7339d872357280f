// Register-tiled products of the attention kernels, and the packing that feeds them.
//
// A tile of C = A B is kRowTile rows by one panel of kPanel columns, all of it in registers. A's
// elements (or pairs of them, attention_operand.h) are broadcast one by one, B's are read as
// contiguous registers: B is packed in panels [k, kPanel], the last panel half as wide where its
// columns fit. Rows of C live in row buffers, a fixed stride apart.
#pragma once

#include "cpu/attention/operand.h"
#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Accumulators, one row of B and one element of A fill the 16 registers of AVX2 (32 of AVX-512).
constexpr int kRowTile = kLanes == 16 ? 8 : 6;
constexpr int kPanel = 2 * kLanes;
// Registers that a pass over a row takes at a time.
constexpr int kAtOnce = kLanes == 16 ? 2 : 1;
constexpr int64_t kMaxDim = 128;
// Between rows of features. An odd number of half cache lines: rows fall into different cache sets.
constexpr int64_t kDimStride = kMaxDim + 8;

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls body(Constant<count>), count in [1, kRowTile].
template <typename Body>
MIMKERNELS_INLINE void with_row_count(int64_t count, const Body& body) {
  switch (count) {
    case 1:
      return body(Constant<1>{});
    case 2:
      return body(Constant<2>{});
    case 3:
      return body(Constant<3>{});
    case 4:
      return body(Constant<4>{});
    case 5:
      return body(Constant<5>{});
    case 6:
      return body(Constant<6>{});
    case 7:
      if constexpr (kRowTile >= 7) body(Constant<7>{});
      return;
    case 8:
      if constexpr (kRowTile >= 8) body(Constant<8>{});
      return;
  }
}

// Columns of the panels that hold `count` columns.
MIMKERNELS_INLINE int64_t padded_columns(int64_t count) { return ceil_div(count, kLanes) * kLanes; }

// ---- packing ----

// kSquare steps of a row, the first of `depth`, those past them 0.
template <typename E, typename T>
MIMKERNELS_INLINE SquareRow load_square(const T* src, int64_t depth) {
  if constexpr (kDepth<E> == 1) {
    return load_part<kSquare>(src);
  } else {
    // D is a multiple of 8, its pairs perhaps only of 4.
    SquareRow out = {};
    memcpy(&out, src, depth < kSquare ? 4 * sizeof(float) : sizeof(out));
    return out;
  }
}

// Panels [steps of D, width] of the transposed rows; rows that `allowed` switches off, and the
// padding, are 0.
template <typename E, typename T>
void pack_transposed(const T* src, int64_t stride, int64_t count, int64_t dim,
                     const uint8_t* allowed, E* dst) {
  constexpr int64_t kStep = kDepth<E>;
  const int64_t depth = dim / kStep;
  for (int64_t first = 0; first < count; first += kPanel) {
    const int64_t width = min_of(kPanel, padded_columns(count - first));
    for (int64_t j = 0; j < width; j += kSquare) {
      const T* rows[kSquare];
      for (int i = 0; i < kSquare; ++i) {
        const int64_t row = first + j + i;
        const bool there = row < count && (allowed == nullptr || allowed[row] != 0);
        rows[i] = there ? src + row * stride : nullptr;
      }
      for (int64_t c = 0; c < depth; c += kSquare) {
        SquareRow square[kSquare];
        MIMKERNELS_UNROLL
        for (int i = 0; i < kSquare; ++i) {
          square[i] =
              rows[i] != nullptr ? load_square<E>(rows[i] + c * kStep, depth - c) : (SquareRow){};
        }
        transpose_square(square);
        MIMKERNELS_UNROLL
        for (int i = 0; i < kSquare; ++i) {
          if (kStep > 1 && i >= 4 && c + i >= depth) break;
          memcpy(dst + ((c + i) * width + j) * kStep, &square[i], sizeof(square[i]));
        }
      }
    }
    dst += dim * width;
  }
}

// Panels [steps of count, width] of the rows' features; padding is 0.
template <typename E, typename T>
void pack_rows(const T* src, int64_t stride, int64_t count, int64_t dim, E* dst) {
  constexpr int64_t kStep = kDepth<E>;
  const int64_t padded = steps_of<E>(count) * kStep;
  for (int64_t j = 0; j < count; j += kStep) {
    const T* row = src + j * stride;
    E* panel = dst;
    int64_t c = 0;
    for (; c + kPanel <= dim; c += kPanel, panel += padded * kPanel) {
      MIMKERNELS_UNROLL
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        store_operand(panel + j * kPanel + v * kStep,
                      load_step<E>(row + c + v, stride, count - j, kLanes));
      }
    }
    const int64_t width = padded_columns(dim - c);
    for (int64_t v = 0; v < width; v += kLanes) {
      store_operand(panel + j * width + v * kStep,
                    load_step<E>(row + c + v, stride, count - j, dim - c - v));
    }
  }
}

// Rows of features, kRowStride lanes apart; padding to whole registers is 0. In fp32 they are
// multiplied by scale; pairs hold two rows each, as they are.
template <typename E, int64_t kRowStride = kDimStride, typename T>
MIMKERNELS_INLINE void copy_rows(const T* src, int64_t stride, int64_t count, int64_t dim,
                                 float scale, E* dst) {
  const Floats factor = splat(scale);
  for (int64_t i = 0; i < count; i += kDepth<E>) {
    const T* row = src + i * stride;
    E* to = dst + i * kRowStride;
    for (int64_t c = 0; c < dim; c += kLanes) {
      Floats step = load_step<E>(row + c, stride, count - i, dim - c);
      if constexpr (kDepth<E> == 1) step *= factor;
      store_operand(to + c * kDepth<E>, step);
    }
  }
}

// The first `left` lanes, at most all, rounded to T.
template <typename T>
MIMKERNELS_INLINE void put_columns(T* dst, Floats value, int64_t left) {
  if (left >= kLanes) return store_part<kLanes>(dst, value);
  Pack<kLanes> some;
  some.v[0] = value;
  store_some<kLanes>(dst, some, left);
}

// dst = src * scale, rounded to T.
template <typename T>
MIMKERNELS_INLINE void write_row(T* dst, const float* src, int64_t dim, float scale) {
  const Floats factor = splat(scale);
  for (int64_t c = 0; c < dim; c += kLanes) {
    put_columns(dst + c, load_floats(src + c) * factor, dim - c);
  }
}

// ---- tiles ----

// acc[r][v] += sum over k < steps of a[r * a_row + k * a_step] * b[k * b_step + v * kLanes ...], in
// pairs where the operands are.
template <typename E, int kRows, int kVectors>
MIMKERNELS_INLINE void multiply(Floats (&acc)[kRows][kVectors], const E* a, int64_t a_row,
                                int64_t a_step, const E* b, int64_t b_step, int64_t steps) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < steps; ++k) {
    decltype(load_operand(b)) right[kVectors];
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load_operand(b + v * kLanes * kDepth<E>);
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto left = spread_operand(a + r * a_row);
      MIMKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = add_product(left, right[v], acc[r][v]);
    }
    a += a_step;
    b += b_step;
  }
}

template <int kRows, int kVectors>
MIMKERNELS_INLINE void clear(Floats (&acc)[kRows][kVectors]) {
  MIMKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = (Floats){};
  }
}

template <int kRows, int kVectors>
MIMKERNELS_INLINE void add_tile(Floats (&acc)[kRows][kVectors], const float* src, int64_t stride) {
  MIMKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] += load_floats(src + r * stride + v * kLanes);
  }
}

template <int kRows, int kVectors>
MIMKERNELS_INLINE void store_tile(const Floats (&acc)[kRows][kVectors], float* dst,
                                  int64_t stride) {
  MIMKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) store_floats(dst + r * stride + v * kLanes, acc[r][v]);
  }
}

// What the scores of a few rows are computed from.
template <typename E>
struct ScoreTile {
  const E* rows = nullptr;    // [rows, D], row_stride apart
  const E* panels = nullptr;  // the keys, from pack_transposed
  int64_t row_stride = kDimStride;
  int64_t dim = 0;
  int64_t run = 0;  // how many products are summed at a time, at most dim
  int64_t keys = 0;
  float scale = 1.0f;                     // of the products
  const float* row_factors = nullptr;     // of the products, [rows] and [keys], or both null
  const float* column_factors = nullptr;  // padded to whole registers
  const float* start = nullptr;           // added to the scores of all panels, or null
  int64_t start_stride = 0;
  const float* tail_start = nullptr;  // where start is null: one row, added to a partial last panel
  float* scores = nullptr;            // [rows, padded keys], kStride apart
  float* maxima = nullptr;            // [rows, kLanes]: the largest score of each lane
};

template <int kStride, bool kMaxima, int kRows, int kVectors, typename E>
MIMKERNELS_INLINE void score_panel(const ScoreTile<E>& t, const E* panel, int64_t first,
                                   const float* start, int64_t start_stride) {
  constexpr int64_t kWidth = kVectors * kLanes;
  constexpr int64_t kStep = kDepth<E>;
  Floats acc[kRows][kVectors];
  clear(acc);
  multiply(acc, t.rows, t.row_stride, kStep, panel, kWidth * kStep, t.run / kStep);
  for (int64_t c = t.run; c < t.dim; c += t.run) {
    float sums[kRows * kWidth];  // not in t.scores, which may hold the bias
    store_tile(acc, sums, kWidth);
    clear(acc);
    multiply(acc, t.rows + c, t.row_stride, kStep, panel + c * kWidth, kWidth * kStep,
             min_of(t.dim - c, t.run) / kStep);
    add_tile(acc, sums, kWidth);
  }
  // Factors, scale and start come last: rounding errors stay those of the product alone.
  if (t.column_factors != nullptr) {
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Floats column = load_floats(t.column_factors + first + v * kLanes);
      MIMKERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][v] = acc[r][v] * splat(t.row_factors[r]) * column;
    }
  }
  if (start != nullptr) {
    const Floats scale = splat(t.scale);
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MIMKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = mul_add(acc[r][v], scale, load_floats(start + r * start_stride + v * kLanes));
      }
    }
  } else if (t.scale != 1.0f) {
    const Floats scale = splat(t.scale);
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MIMKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] *= scale;
    }
  }
  store_tile(acc, t.scores + first, kStride);
  if constexpr (kMaxima) {
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Floats best = load_floats(t.maxima + r * kLanes);
      MIMKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) best = max_or_second(acc[r][v], best);
      store_floats(t.maxima + r * kLanes, best);
    }
  }
}

// scores = factors * scale * rows * keys^T (+ start), and each lane's maximum; NaN never wins a maximum.
template <int kStride, bool kMaxima, int kRows, typename E>
void score_rows(const ScoreTile<E>& t) {
  if constexpr (kMaxima) {
    for (int r = 0; r < kRows; ++r) store_floats(t.maxima + r * kLanes, splat(-kInfinity));
  }
  const E* panel = t.panels;
  int64_t first = 0;
  for (; first + kPanel <= t.keys; first += kPanel, panel += kPanel * t.dim) {
    const float* start = t.start == nullptr ? nullptr : t.start + first;
    score_panel<kStride, kMaxima, kRows, 2>(t, panel, first, start, t.start_stride);
  }
  if (first == t.keys) return;
  const float* start = t.start == nullptr ? t.tail_start : t.start + first;
  const int64_t stride = t.start == nullptr ? 0 : t.start_stride;
  if (t.keys - first > kLanes) {
    score_panel<kStride, kMaxima, kRows, 2>(t, panel, first, start, stride);
  } else {
    score_panel<kStride, kMaxima, kRows, 1>(t, panel, first, start, stride);
  }
}

// How many weighted rows are summed at a time, at most: rounding errors grow with the length of a
// chain of additions. Up to 256 rows, one more sum of a tile would cost a hundredth and gain little
// where products are not rounded.
constexpr int64_t kLongestRun = kFused ? 256 : 128;

// The sums over keys of weights[r * kRowStride + key] * panels[key, :], with the panels of
// pack_rows, added to the rows of `start` if kAdd: finish(r, c, value) takes a register of row r
// from column c.
template <int kRowStride, bool kAdd, int kRows, typename E, typename Finish>
void weigh_panels(const E* weights, const E* panels, int64_t keys, int64_t dim, const float* start,
                  const Finish& finish) {
  constexpr int64_t kStep = kDepth<E>;
  const int64_t steps = steps_of<E>(keys);
  const int64_t run = ceil_div(steps, max_of(1, ceil_div(keys, kLongestRun)));
  const auto panel_of = [&](auto vectors, const E* panel, int64_t c) MIMKERNELS_LAMBDA_INLINE {
    constexpr int64_t kWidth = vectors.value * kLanes;
    Floats acc[kRows][vectors.value];
    clear(acc);
    multiply(acc, weights, kRowStride, kStep, panel, kWidth * kStep, min_of(run, steps));
    for (int64_t k = run; k < steps; k += run) {
      float sums[kRows * kWidth];
      store_tile(acc, sums, kWidth);
      clear(acc);
      multiply(acc, weights + k * kStep, kRowStride, kStep, panel + k * kWidth * kStep,
               kWidth * kStep, min_of(run, steps - k));
      add_tile(acc, sums, kWidth);
    }
    if constexpr (kAdd) add_tile(acc, start + c, kDimStride);
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MIMKERNELS_UNROLL
      for (int v = 0; v < vectors.value; ++v) finish(r, c + v * kLanes, acc[r][v]);
    }
  };
  int64_t c = 0;
  for (; c + kLanes < dim; c += kPanel, panels += kPanel * steps * kStep) {
    panel_of(Constant<2>{}, panels, c);
  }
  if (c < dim) panel_of(Constant<1>{}, panels, c);
}

// out[key, :] += sum over rows of weights[row * kRowStride + key] * right[row, :] for kKeys keys;
// right is from copy_rows, and in pairs so are weights.
template <int kRowStride, int kKeys, typename E>
void gather_panels(const E* weights, const E* right, int64_t rows, int64_t dim, float* out,
                   int64_t out_stride) {
  constexpr int64_t kStep = kDepth<E>;
  const auto panel_of = [&](auto vectors, int64_t c) MIMKERNELS_LAMBDA_INLINE {
    Floats acc[kKeys][vectors.value];
    clear(acc);
    multiply(acc, weights, kStep, kRowStride * kStep, right + c * kStep, kDimStride * kStep,
             steps_of<E>(rows));
    add_tile(acc, out + c, out_stride);
    store_tile(acc, out + c, out_stride);
  };
  int64_t c = 0;
  for (; c + kLanes < dim; c += kPanel) panel_of(Constant<2>{}, c);
  if (c < dim) panel_of(Constant<1>{}, c);
}

}  // namespace mimkernels::MIMKERNELS_ISA

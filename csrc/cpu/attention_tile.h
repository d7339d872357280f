// Register-tiled products of the attention kernels, and the packing that feeds them.
//
// A tile of C = A B is kRowTile rows by one panel of kPanel columns, all of it in registers. A's
// elements are broadcast one by one, B's are read as contiguous registers: B is packed in panels
// [k, kPanel], the last panel half as wide where its columns fit. Rows of A and C live in row
// buffers, a fixed stride apart.
#pragma once

#include "attention_math.h"
#include "rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Accumulators, one row of B and one element of A fill the 16 registers of AVX2 (32 of AVX-512).
constexpr int kRowTile = kLanes == 16 ? 8 : 6;
constexpr int kPanel = 2 * kLanes;
#define MIMKERNELS_LAMBDA_INLINE __attribute__((always_inline))
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

// Panels [D, width] of the transposed rows; rows that `allowed` switches off, and the padding, are
// 0.
template <typename T>
void pack_transposed(const T* src, int64_t stride, int64_t count, int64_t dim,
                     const uint8_t* allowed, float* dst) {
  for (int64_t first = 0; first < count; first += kPanel) {
    const int64_t width = min_of(kPanel, padded_columns(count - first));
    for (int64_t j = 0; j < width; j += kSquare) {
      const T* rows[kSquare];
      for (int i = 0; i < kSquare; ++i) {
        const int64_t row = first + j + i;
        const bool there = row < count && (allowed == nullptr || allowed[row] != 0);
        rows[i] = there ? src + row * stride : nullptr;
      }
      for (int64_t c = 0; c < dim; c += kSquare) {
        SquareRow square[kSquare];
        MIMKERNELS_UNROLL
        for (int i = 0; i < kSquare; ++i) {
          square[i] = rows[i] != nullptr ? load_part<kSquare>(rows[i] + c) : (SquareRow){};
        }
        transpose_square(square);
        MIMKERNELS_UNROLL
        for (int i = 0; i < kSquare; ++i) store_part<kSquare>(dst + (c + i) * width + j, square[i]);
      }
    }
    dst += dim * width;
  }
}

// Panels [count, width] of the rows' features; padding is 0.
template <typename T>
void pack_rows(const T* src, int64_t stride, int64_t count, int64_t dim, float* dst) {
  for (int64_t j = 0; j < count; ++j) {
    const T* row = src + j * stride;
    float* panel = dst;
    int64_t c = 0;
    for (; c + kPanel <= dim; c += kPanel, panel += count * kPanel) {
      MIMKERNELS_UNROLL
      for (int v = 0; v < 2; ++v) {
        store_floats(panel + j * kPanel + v * kLanes, load_part<kLanes>(row + c + v * kLanes));
      }
    }
    const int64_t width = padded_columns(dim - c);
    for (int64_t v = 0; v < width; v += kLanes) {
      const bool whole = dim - c - v >= kLanes;
      store_floats(panel + j * width + v, whole ? load_part<kLanes>(row + c + v)
                                                : load_some<kLanes>(row + c + v, dim - c - v).v[0]);
    }
  }
}

// Rows of features in fp32, times scale, kDimStride apart; padding to whole registers is 0.
template <typename T>
MIMKERNELS_INLINE void copy_rows(const T* src, int64_t stride, int64_t count, int64_t dim,
                                 float scale, float* dst) {
  const Floats factor = splat(scale);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = src + i * stride;
    float* to = dst + i * kDimStride;
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes)
      store_floats(to + c, load_part<kLanes>(row + c) * factor);
    if (c < dim) store_floats(to + c, load_some<kLanes>(row + c, dim - c).v[0] * factor);
  }
}

// dst = src * scale, rounded to T.
template <typename T>
MIMKERNELS_INLINE void write_row(T* dst, const float* src, int64_t dim, float scale) {
  const Floats factor = splat(scale);
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) store_part<kLanes>(dst + c, load_floats(src + c) * factor);
  if (c < dim) {
    Pack<kLanes> last;
    last.v[0] = load_floats(src + c) * factor;
    store_some<kLanes>(dst + c, last, dim - c);
  }
}

// ---- tiles ----

// acc[r][v] += sum over k < count of a[r * a_row + k * a_step] * b[k * b_step + v * kLanes ...].
template <int kRows, int kVectors>
MIMKERNELS_INLINE void multiply(Floats (&acc)[kRows][kVectors], const float* a, int64_t a_row,
                                int64_t a_step, const float* b, int64_t b_step, int64_t count) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    Floats right[kVectors];
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load_floats(b + v * kLanes);
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Floats left = splat(a[r * a_row]);
      MIMKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = mul_add(left, right[v], acc[r][v]);
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
MIMKERNELS_INLINE void load_tile(Floats (&acc)[kRows][kVectors], const float* src, int64_t stride) {
  MIMKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load_floats(src + r * stride + v * kLanes);
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
struct ScoreTile {
  const float* rows = nullptr;    // [rows, D], kDimStride apart
  const float* panels = nullptr;  // the keys, from pack_transposed
  int64_t dim = 0;
  int64_t run = 0;  // how many products are summed at a time, at most dim
  int64_t keys = 0;
  float scale = 1.0f;            // of the products
  const float* start = nullptr;  // added to the scores of all panels, or null
  int64_t start_stride = 0;
  const float* tail_start = nullptr;  // where start is null: one row, added to a partial last panel
  float* scores = nullptr;            // [rows, padded keys], kStride apart
  float* maxima = nullptr;            // [rows, kLanes]: the largest score of each lane
};

template <int kStride, bool kMaxima, int kRows, int kVectors>
MIMKERNELS_INLINE void score_panel(const ScoreTile& t, const float* panel, int64_t first,
                                   const float* start, int64_t start_stride) {
  constexpr int64_t kStep = kVectors * kLanes;
  Floats acc[kRows][kVectors];
  clear(acc);
  multiply(acc, t.rows, kDimStride, 1, panel, kStep, t.run);
  for (int64_t c = t.run; c < t.dim; c += t.run) {
    float sums[kRows * kStep];  // not in t.scores, which may hold the bias
    store_tile(acc, sums, kStep);
    clear(acc);
    multiply(acc, t.rows + c, kDimStride, 1, panel + c * kStep, kStep, min_of(t.dim - c, t.run));
    add_tile(acc, sums, kStep);
  }
  // Scale and start come last: rounding errors stay those of the product alone.
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

// scores = scale * rows * keys^T (+ start), and each lane's maximum; NaN never wins a maximum.
template <int kStride, bool kMaxima, int kRows>
void score_rows(const ScoreTile& t) {
  if constexpr (kMaxima) {
    for (int r = 0; r < kRows; ++r) store_floats(t.maxima + r * kLanes, splat(-kInfinity));
  }
  const float* panel = t.panels;
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

// out[r, :] (+)= sum over keys of weights[r * kRowStride + key * kKeyStride] * panels[key, :], with
// the panels of pack_rows.
template <int kRowStride, int kKeyStride, bool kAdd, int kRows>
void weigh_panels(const float* weights, const float* panels, int64_t keys, int64_t dim,
                  float* out) {
  const auto panel_of = [&](auto vectors, const float* panel, float* to) MIMKERNELS_LAMBDA_INLINE {
    Floats acc[kRows][vectors.value];
    if constexpr (kAdd) {
      load_tile(acc, to, kDimStride);
    } else {
      clear(acc);
    }
    multiply(acc, weights, kRowStride, kKeyStride, panel, vectors.value * kLanes, keys);
    store_tile(acc, to, kDimStride);
  };
  int64_t c = 0;
  for (; c + kLanes < dim; c += kPanel, panels += kPanel * keys) {
    panel_of(Constant<2>{}, panels, out + c);
  }
  if (c < dim) panel_of(Constant<1>{}, panels, out + c);
}

// out[key, :] += sum over rows of weights[row * kRowStride + key] * right[row, :] for kKeys keys;
// right and out are row buffers.
template <int kRowStride, int kKeys>
void gather_panels(const float* weights, const float* right, int64_t rows, int64_t dim, float* out,
                   int64_t out_stride) {
  const auto panel_of = [&](auto vectors, int64_t c) MIMKERNELS_LAMBDA_INLINE {
    Floats acc[kKeys][vectors.value];
    load_tile(acc, out + c, out_stride);
    multiply(acc, weights, 1, kRowStride, right + c, kDimStride, rows);
    store_tile(acc, out + c, out_stride);
  };
  int64_t c = 0;
  for (; c + kLanes < dim; c += kPanel) panel_of(Constant<2>{}, c);
  if (c < dim) panel_of(Constant<1>{}, c);
}

}  // namespace mimkernels::MIMKERNELS_ISA

// Products of bf16 matrices in the tiles of AMX, and a stand-in that computes the same without it.
//
// A tile is 16 rows of 64 bytes: 16 x 16 fp32 numbers, or 16 rows of 32 bf16. One step multiplies
// 32 numbers deep: A [16, 32] as it lies in memory, B [32, 16] in pairs of rows, as
// pack_tiles_transposed and pack_tiles_rows leave them.
//
// numerics: a product of two bf16 is exact in fp32. A step sums its even and its odd products in
//           chains of their own, adds the two, then adds that to C, each sum rounded to nearest
//           even. Subnormal numbers count as 0, in A, B and C alike; NaN and infinity are kept.
#pragma once

#include "cpu/attention/tile.h"

namespace mimkernels::MIMKERNELS_ISA {

// Where attention multiplies bf16 in tiles: on AMX, and in the build that tests this with the
// stand-in.
#if defined(MIMKERNELS_MATRIX_TILES)
constexpr bool kMatrixTiles = true;
#else
constexpr bool kMatrixTiles = false;
#endif

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileSize = kTileDepth * kTileColumns;  // bf16 numbers of a tile of B

#if defined(MIMKERNELS_MATRIX_TILES)

// The tiles of this thread are set up while one of these lives. Not to be nested, nor kept across
// code of others, which may set them up differently.
class TilesInUse {
 public:
  TilesInUse() {
#if defined(__AMX_TILE__)
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    static_assert(sizeof(shapes) == 64);
    // Not _tile_loadconfig, which tells GCC 12 of eight of the bytes alone.
    asm volatile("ldtilecfg %0" ::"m"(shapes));
#endif
  }
  ~TilesInUse() {
#if defined(__AMX_TILE__)
    asm volatile("tilerelease");
#endif
  }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// C = A B, added to C if kAdd, for kRows x kColumns tiles of C, at most 2 x 2, over `steps` steps.
struct TileProduct {
  const bf16* a = nullptr;  // [16 kRows, 32 steps], 2-byte aligned
  int64_t a_stride = 0;     // between rows
  const bf16* b = nullptr;  // [steps, a tile of B], 64-byte aligned
  int64_t b_panel = 0;      // from one column of tiles to the next
  float* c = nullptr;       // [16 kRows, 16 kColumns]
  int64_t c_stride = 0;     // between rows
  int64_t steps = 0;
};

#if defined(__AMX_TILE__)

// C in tiles 0 to 3, A in 4 and 5, B in 6 and 7. The compiler knows neither what a tile load reads
// nor that it must not move stores across it: hence the barriers.
template <int kRows, int kColumns, bool kAdd>
MIMKERNELS_INLINE void multiply_tiles(const TileProduct& t) {
  static_assert(kRows >= 1 && kRows <= 2 && kColumns >= 1 && kColumns <= 2);
  constexpr int64_t kFloat = sizeof(float);
  constexpr int64_t kHalf = sizeof(bf16);
  const int64_t c_bytes = t.c_stride * kFloat;
  const int64_t a_bytes = t.a_stride * kHalf;
  float* const below = t.c + kTileRows * t.c_stride;
  asm volatile("" ::: "memory");
  if constexpr (kAdd) {
    _tile_loadd(0, t.c, c_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, t.c + kTileColumns, c_bytes);
    if constexpr (kRows > 1) _tile_loadd(2, below, c_bytes);
    if constexpr (kRows > 1 && kColumns > 1) _tile_loadd(3, below + kTileColumns, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns > 1) _tile_zero(1);
    if constexpr (kRows > 1) _tile_zero(2);
    if constexpr (kRows > 1 && kColumns > 1) _tile_zero(3);
  }
  const bf16* a = t.a;
  const bf16* b = t.b;
  for (int64_t step = 0; step < t.steps; ++step, a += kTileDepth, b += kTileSize) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns > 1) {
      _tile_loadd(7, b + t.b_panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      _tile_loadd(5, a + kTileRows * t.a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, t.c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, t.c + kTileColumns, c_bytes);
  if constexpr (kRows > 1) _tile_stored(2, below, c_bytes);
  if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, below + kTileColumns, c_bytes);
  asm volatile("" ::: "memory");
}

#else

MIMKERNELS_INLINE Floats flush_subnormals(Floats x) {
  return choose_lanes((Ints)(((Words)x & 0x7f800000u) == 0u), (Floats){}, x);
}

// One step of one tile.
MIMKERNELS_INLINE void add_tile_step(const bf16* a, int64_t a_stride, const bf16* b, float* c,
                                     int64_t c_stride) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t column = 0; column < kTileColumns; column += kLanes) {
      Floats even = {};
      Floats odd = {};
      for (int64_t k = 0; k < kTileDepth; k += 2) {
        Words pairs;
        memcpy(&pairs, b + k * kTileColumns + 2 * column, sizeof(pairs));
        const Floats left_even = (Floats)((uint32_t{a[r * a_stride + k].bits} << 16) - (Words){});
        const Floats left_odd =
            (Floats)((uint32_t{a[r * a_stride + k + 1].bits} << 16) - (Words){});
        even = mul_add(flush_subnormals(left_even), flush_subnormals((Floats)(pairs << 16)), even);
        odd = mul_add(flush_subnormals(left_odd), flush_subnormals((Floats)(pairs & 0xffff0000u)),
                      odd);
      }
      float* to = c + r * c_stride + column;
      store_floats(to, flush_subnormals(flush_subnormals(load_floats(to)) + (even + odd)));
    }
  }
}

template <int kRows, int kColumns, bool kAdd>
MIMKERNELS_INLINE void multiply_tiles(const TileProduct& t) {
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t n = 0; n < kColumns; ++n) {
      float* c = t.c + m * kTileRows * t.c_stride + n * kTileColumns;
      for (int64_t r = 0; !kAdd && r < kTileRows; ++r) {
        memset(c + r * t.c_stride, 0, kTileColumns * sizeof(float));
      }
      for (int64_t step = 0; step < t.steps; ++step) {
        add_tile_step(t.a + m * kTileRows * t.a_stride + step * kTileDepth, t.a_stride,
                      t.b + n * t.b_panel + step * kTileSize, c, t.c_stride);
      }
    }
  }
}

#endif

// C = A B for any number of tiles; kAdd as above. b_panel and b hold [column tiles, steps].
template <bool kAdd>
void multiply_all_tiles(const TileProduct& all, int64_t row_tiles, int64_t column_tiles) {
  for (int64_t n = 0; n < column_tiles; n += 2) {
    for (int64_t m = 0; m < row_tiles; m += 2) {
      TileProduct t = all;
      t.a += m * kTileRows * t.a_stride;
      t.b += n * t.b_panel;
      t.c += m * kTileRows * t.c_stride + n * kTileColumns;
      const bool two_rows = m + 1 < row_tiles;
      const bool two_columns = n + 1 < column_tiles;
      if (two_rows && two_columns) {
        multiply_tiles<2, 2, kAdd>(t);
      } else if (two_rows) {
        multiply_tiles<2, 1, kAdd>(t);
      } else if (two_columns) {
        multiply_tiles<1, 2, kAdd>(t);
      } else {
        multiply_tiles<1, 1, kAdd>(t);
      }
    }
  }
}

// ---- packing ----

// A row that is not there.
alignas(64) constexpr bf16 kNoRow[kMaxDim] = {};

// 16 words, each a pair of bf16.
struct WordRow {
  static constexpr int kParts = 16 / kLanes;
  Words part[kParts];
};

// 16 x 16 words, transposed in registers.
MIMKERNELS_INLINE void transpose_words(WordRow (&rows)[16]) {
#if defined(__AVX512F__)
  // Words, two words, 128 bits of two rows at a time.
  __m512i a[16];
  __m512i b[16];
  MIMKERNELS_UNROLL
  for (int i = 0; i < 16; i += 2) {
    const __m512i even = (__m512i)rows[i].part[0];
    const __m512i odd = (__m512i)rows[i + 1].part[0];
    b[i] = _mm512_maskz_unpacklo_epi32(0xffff, even, odd);
    b[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, even, odd);
  }
  MIMKERNELS_UNROLL
  for (int i = 0; i < 16; ++i) {
    const int first = i / 4 * 4 + i % 4 / 2;
    a[i] = i % 2 == 0 ? _mm512_maskz_unpacklo_epi64(0xff, b[first], b[first + 2])
                      : _mm512_maskz_unpackhi_epi64(0xff, b[first], b[first + 2]);
  }
  // a[4 r + c] has words c, 4 + c, 8 + c, 12 + c of rows 4 r to 4 r + 3.
  MIMKERNELS_UNROLL
  for (int c = 0; c < 4; ++c) {
    MIMKERNELS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const __m512i top = a[8 * r + c];
      const __m512i low = a[8 * r + 4 + c];
      b[8 * r + c] = _mm512_maskz_shuffle_i32x4(0xffff, top, low, 0x88);
      b[8 * r + 4 + c] = _mm512_maskz_shuffle_i32x4(0xffff, top, low, 0xdd);
    }
    MIMKERNELS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512i top = b[i % 2 * 4 + c];
      const __m512i low = b[8 + i % 2 * 4 + c];
      rows[4 * i + c].part[0] = (Words)(i < 2 ? _mm512_maskz_shuffle_i32x4(0xffff, top, low, 0x88)
                                              : _mm512_maskz_shuffle_i32x4(0xffff, top, low, 0xdd));
    }
  }
#else
  static_assert(kLanes == kSquare);
  WordRow out[16];
  for (int r = 0; r < WordRow::kParts; ++r) {
    for (int c = 0; c < WordRow::kParts; ++c) {
      SquareRow square[kSquare];
      for (int i = 0; i < kSquare; ++i) square[i] = (SquareRow)rows[r * kSquare + i].part[c];
      transpose_square(square);
      for (int i = 0; i < kSquare; ++i) out[c * kSquare + i].part[r] = (Words)square[i];
    }
  }
  for (int i = 0; i < 16; ++i) rows[i] = out[i];
#endif
}

// dst[pair, row] = pair `pair` of row `row`, from a feature on: 16 pairs of 16 rows.
MIMKERNELS_INLINE void transpose_pairs(const bf16* const (&rows)[kTileRows], int64_t feature,
                                       bf16* dst) {
  WordRow words[kTileRows];
  MIMKERNELS_UNROLL
  for (int i = 0; i < kTileRows; ++i) memcpy(&words[i], rows[i] + feature, sizeof(words[i]));
  transpose_words(words);
  MIMKERNELS_UNROLL
  for (int i = 0; i < kTileRows; ++i) {
    memcpy(dst + i * 2 * kTileColumns, &words[i], sizeof(words[i]));
  }
}

// B = the transpose of `count` rows of `dim` features (multiples of 8): a panel per 16 rows, each
// [ceil(dim / 32), 16 pairs of features, 16 rows]. Rows that `allowed` switches off, and the
// padding, are 0.
inline void pack_tiles_transposed(const bf16* src, int64_t stride, int64_t count, int64_t dim,
                                  const uint8_t* allowed, bf16* dst) {
  const int64_t whole = dim / kTileDepth * kTileDepth;
  for (int64_t first = 0; first < count; first += kTileColumns) {
    const bf16* rows[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = first + i;
      const bool there = row < count && (allowed == nullptr || allowed[row] != 0);
      rows[i] = there ? src + row * stride : kNoRow;
    }
    for (int64_t c = 0; c < whole; c += kTileDepth, dst += kTileSize) {
      transpose_pairs(rows, c, dst);
    }
    if (whole == dim) continue;
    alignas(64) bf16 rest[kTileRows][kTileDepth];
    for (int64_t i = 0; i < kTileRows; ++i) {
      memset(rest[i], 0, sizeof(rest[i]));
      for (int64_t c = whole; c < dim; c += 8) {
        memcpy(rest[i] + c - whole, rows[i] + c, 8 * sizeof(bf16));
      }
      rows[i] = rest[i];
    }
    transpose_pairs(rows, 0, dst);
    dst += kTileSize;
  }
}

// L numbers of two rows in pairs.
template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::U pair_up(typename VecTypes<L>::H even,
                                                  typename VecTypes<L>::H odd) {
  return widen<L>(even) | widen<L>(odd) << 16;
}
template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::U pair_up(const bf16* even, const bf16* odd) {
  typename VecTypes<L>::H low;
  typename VecTypes<L>::H high;
  memcpy(&low, even, sizeof(low));
  memcpy(&high, odd, sizeof(high));
  return pair_up<L>(low, high);
}

// B = `count` rows of `dim` features (a multiple of 8): a panel per 16 features, each
// [ceil(count / 32), 16 pairs of rows, 16 features]; the padding is 0.
inline void pack_tiles_rows(const bf16* src, int64_t stride, int64_t count, int64_t dim,
                            bf16* dst) {
  const int64_t padded = ceil_div(count, kTileDepth) * kTileDepth;
  const int64_t panel = padded * kTileColumns;
  for (int64_t row = 0; row < padded; row += 2) {
    const bf16* const even = row < count ? src + row * stride : kNoRow;
    const bf16* const odd = row + 1 < count ? src + (row + 1) * stride : kNoRow;
    bf16* to = dst + row * kTileColumns;
    int64_t c = 0;
    for (; c + kTileColumns <= dim; c += kTileColumns, to += panel) {
      MIMKERNELS_UNROLL
      for (int64_t k = 0; k < kTileColumns; k += kLanes) {
        const Words pairs = pair_up<kLanes>(even + c + k, odd + c + k);
        memcpy(to + 2 * k, &pairs, sizeof(pairs));
      }
    }
    if (c == dim) continue;
    const typename VecTypes<8>::U pairs = pair_up<8>(even + c, odd + c);
    memcpy(to, &pairs, sizeof(pairs));
    memset(to + kTileColumns, 0, kTileColumns * sizeof(bf16));
  }
}

// A row of A: `dim` features, a multiple of 8.
MIMKERNELS_INLINE void copy_features(const bf16* src, int64_t dim, bf16* dst) {
  int64_t c = 0;
  for (; c + kTileDepth <= dim; c += kTileDepth) {
    memcpy(dst + c, src + c, kTileDepth * sizeof(bf16));
  }
  for (; c < dim; c += 8) memcpy(dst + c, src + c, 8 * sizeof(bf16));
}

// dst = src * scale, as P is rounded; dim is a multiple of 8.
MIMKERNELS_INLINE void round_row(bf16* dst, const float* src, int64_t dim, float scale) {
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) store_weights(dst + c, load_floats(src + c) * scale);
  if (c < dim) store_part<8>(dst + c, load_part<8>(src + c) * scale);
}

// bf16 numbers that pack_tiles_transposed and pack_tiles_rows fill.
MIMKERNELS_INLINE int64_t tiles_transposed_size(int64_t count, int64_t dim) {
  return ceil_div(count, kTileColumns) * ceil_div(dim, kTileDepth) * kTileSize;
}
MIMKERNELS_INLINE int64_t tiles_rows_size(int64_t count, int64_t dim) {
  return ceil_div(dim, kTileColumns) * ceil_div(count, kTileDepth) * kTileSize;
}

#endif  // MIMKERNELS_MATRIX_TILES

}  // namespace mimkernels::MIMKERNELS_ISA

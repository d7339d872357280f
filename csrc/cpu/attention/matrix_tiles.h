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

#include "cpu/attention/math.h"

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

// B = the transpose of `count` rows of `dim` features (multiples of 8): a panel per 16 rows, each
// [ceil(dim / 32), 16 pairs of features, 16 rows]. Rows that `allowed` switches off, and the
// padding, are 0.
MIMKERNELS_INLINE void pack_tiles_transposed(const bf16* src, int64_t stride, int64_t count,
                                             int64_t dim, const uint8_t* allowed, bf16* dst) {
  const int64_t steps = ceil_div(dim, kTileDepth);
  for (int64_t first = 0; first < count; first += kTileColumns, dst += steps * kTileSize) {
    for (int64_t j = 0; j < kTileColumns; j += kSquare) {
      const bf16* rows[kSquare];
      for (int i = 0; i < kSquare; ++i) {
        const int64_t row = first + j + i;
        const bool there = row < count && (allowed == nullptr || allowed[row] != 0);
        rows[i] = there ? src + row * stride : nullptr;
      }
      // A column of the square is a pair of features, kSquare of them at a time; 8 features are
      // half a square where it is 8 wide.
      for (int64_t c = 0; c < steps * kTileDepth; c += 2 * kSquare) {
        SquareRow square[kSquare];
        const int64_t left = min_of(2 * kSquare, dim - c);
        for (int i = 0; i < kSquare; ++i) {
          square[i] = (SquareRow){};
          if (rows[i] != nullptr && left > 0) {
            memcpy(&square[i], rows[i] + c,
                   left < 2 * kSquare ? kSquare * sizeof(bf16) : sizeof(SquareRow));
          }
        }
        transpose_square(square);
        for (int i = 0; i < kSquare; ++i) {
          memcpy(dst + (c / 2 + i) * 2 * kTileColumns + 2 * j, &square[i], sizeof(square[i]));
        }
      }
    }
  }
}

// B = `count` rows of `dim` features (a multiple of 8): a panel per 16 features, each
// [ceil(count / 32), 16 pairs of rows, 16 features]; the padding is 0.
MIMKERNELS_INLINE void pack_tiles_rows(const bf16* src, int64_t stride, int64_t count, int64_t dim,
                                       bf16* dst) {
  const int64_t panel = ceil_div(count, kTileDepth) * kTileSize;
  const int64_t padded = ceil_div(count, kTileDepth) * kTileDepth;
  for (int64_t row = 0; row < padded; row += 2) {
    for (int64_t c = 0; c < dim; c += 8) {
      typename VecTypes<8>::H even = {};
      typename VecTypes<8>::H odd = {};
      if (row < count) memcpy(&even, src + row * stride + c, sizeof(even));
      if (row + 1 < count) memcpy(&odd, src + (row + 1) * stride + c, sizeof(odd));
      using Pairs = typename VecTypes<8>::U;
      const Pairs pairs = __builtin_convertvector(even, Pairs) | __builtin_convertvector(odd, Pairs)
                                                                     << 16;
      memcpy(dst + c / kTileColumns * panel + row * kTileColumns + 2 * (c % kTileColumns), &pairs,
             sizeof(pairs));
    }
    if (dim % kTileColumns != 0) {
      memset(dst + dim / kTileColumns * panel + row * kTileColumns + kTileColumns, 0,
             kTileColumns * sizeof(bf16));
    }
  }
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

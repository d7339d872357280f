// Products in tiles, by the instructions of AMX in one build and by their stand-in in another.
#include <vector>

#include "cpu/attention/matrix_tiles.h"
#include "exported.h"

#define JOINED_OF(left, right) left##right
#define JOINED(left, right) JOINED_OF(left, right)

using namespace mimkernels::MIMKERNELS_ISA;

// c [16 row_tiles, whole tiles] (+)= a b, b being [depth, columns], or its transpose if
// `transposed`. a has whole tiles, whose columns past `depth` are 0.
EXPORTED void JOINED(multiply_, MIMKERNELS_ISA)(const bf16* a, int64_t a_stride, int64_t row_tiles,
                                                const bf16* b, int64_t b_stride, int64_t depth,
                                                int64_t columns, bool transposed, bool add,
                                                float* c, int64_t c_stride) {
  const int64_t steps = ceil_div(depth, kTileDepth);
  const int64_t column_tiles = ceil_div(columns, kTileColumns);
  struct alignas(64) Line {
    bf16 numbers[32];
  };
  std::vector<Line> packed(static_cast<size_t>(column_tiles * steps * kTileSize / 32));
  bf16* const tiles = packed[0].numbers;
  if (transposed) {
    pack_tiles_transposed(b, b_stride, columns, depth, nullptr, tiles);
  } else {
    pack_tiles_rows(b, b_stride, depth, columns, tiles);
  }
  const TileProduct product{a, a_stride, tiles, steps * kTileSize, c, c_stride, steps};
  const TilesInUse in_use;
  if (add) {
    multiply_all_tiles<true>(product, row_tiles, column_tiles);
  } else {
    multiply_all_tiles<false>(product, row_tiles, column_tiles);
  }
}

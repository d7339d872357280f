// How attention_bwd of a whole head per block cuts its work.
#pragma once

#include "cuda/attention/tiling.h"

namespace mimkernels::cuda {

// Of 16-bit elements. A warp owns one or two strips of keys, as registers allow: they leave a
// multiprocessor 16 warps at up to 32 features and 8 warps at up to 64.
constexpr int kHeadDim = 64;  // at most
template <int DIM>
constexpr int kHeadStrips = DIM <= 32 ? 1 : 2;
template <int DIM>
constexpr int kHeadWarps = DIM <= 32 ? 16 : 8;
// Numbers of a query: lse and what it lost, delta, coefficients.
template <bool COEF>
constexpr int kHeadNumbers = COEF ? 9 : 3;

struct HeadTiling {
  int heads = 1;  // of a block
  int warps = 0;  // of a head
  int key_strips = 0;
  int query_strips = 0;
  int planes = 0;  // pairs of coordinates of a token
  int chunk = 0;   // strips of queries between barriers; 0: the head does not fit
  int head_bytes = 0;
  int shared_bytes = 0;

  int threads() const { return heads * warps * 32; }
  unsigned blocks(int all_heads) const {
    return static_cast<unsigned>((all_heads + heads - 1) / heads);
  }
};

// In at most `budget` bytes of shared memory; tokens have `points` coordinates, 0 where they are not
// asked for. Short heads share a block. 163 KiB hold as many queries as there may be keys, 256; so
// do 99 KiB (8.6, 8.9, 12.0) at 32 features, at 64 they hold 208 tokens, with coefficients 192.
inline HeadTiling head_tiling(int64_t queries, int64_t keys, int dim, bool coef, int points,
                              int budget) {
  HeadTiling tiling;
  const int strips = dim <= 32 ? kHeadStrips<32> : kHeadStrips<64>;
  const int most_warps = dim <= 32 ? kHeadWarps<32> : kHeadWarps<64>;
  const int row = row_bytes_of(dim <= 32 ? 32 : 64, 2);
  // No head with more queries fits.
  if (queries == 0 || keys == 0 || dim > kHeadDim || keys > most_warps * strips * kStrip ||
      queries * row > budget) {
    return tiling;
  }
  tiling.key_strips = int_ceil_div(keys, kStrip);
  tiling.query_strips = int_ceil_div(queries, kStrip);
  tiling.warps = int_ceil_div(tiling.key_strips, strips);
  tiling.planes = int_ceil_div(points, 2);
  tiling.heads = tiling.warps <= 2 ? 4 / tiling.warps : 1;
  const int numbers = coef ? kHeadNumbers<true> : kHeadNumbers<false>;
  const int fixed =
      kStrip * ((tiling.key_strips + 2 * tiling.query_strips) * row +
                tiling.query_strips * numbers * 4 + tiling.warps * strips * tiling.planes * 8);
  const int group_row = tiling.key_strips * kStrip * kStrip * 2;  // dS of a strip of queries
  while (tiling.heads > 1 && budget / tiling.heads < fixed + group_row) {
    tiling.heads /= 2;
  }
  const int most = (budget / tiling.heads - fixed) / group_row;
  if (most <= 0) {
    return tiling;
  }
  tiling.chunk = int_ceil_div(tiling.query_strips, int_ceil_div(tiling.query_strips, most));
  tiling.head_bytes = fixed + tiling.chunk * group_row;
  tiling.shared_bytes = tiling.heads * tiling.head_bytes;
  return tiling;
}

}  // namespace mimkernels::cuda

// How the launchers of attention tile their work: every warp owns a strip of 16 tokens of one side
// (queries, or keys) and sees the tokens of the other side tile by tile, through shared memory.
#pragma once

#include <cstdint>

#include "core/attention.h"

namespace mimkernels::cuda {

constexpr int kStrip = 16;
// Shared memory that a block can have on every architecture from sm_80 on.
constexpr int kSharedBudget = 99 * 1024;

struct StripTiling {
  int row_blocks = 1;  // blocks that share the strips of a head
  int strips = 1;      // of each of its heads that a block owns
  int heads = 1;       // of a block
  int tile = kStrip;   // tokens of the other side that are visited at a time
  int tiles = 0;
  int own = kStrip;  // tokens of a warp
  int shared_bytes = 0;
  // strips_tiling alone: where tokens lie in shared memory, pairs of coordinates of so many tokens.
  int head_at = 0;
  int points_at = 0;
  int planes = 0;
  int padded = 0;

  int warps() const { return heads * strips; }
  unsigned blocks(int all_heads) const {
    return static_cast<unsigned>((all_heads + heads - 1) / heads) *
           static_cast<unsigned>(row_blocks);
  }
};

inline int int_ceil_div(int64_t count, int64_t size) {
  return static_cast<int>((count + size - 1) / size);
}

// A strip has `own` rows of shared memory and a tile `other` rows per token, of `row_bytes` each.
// Two tiles are in flight. Short heads share a block, so that blocks have four warps or more. Rows
// of at most 528 bytes fit with one warp at least.
inline StripTiling tile_strips(int64_t own_tokens, int64_t other_tokens, int own, int other,
                               int row_bytes, int most_warps, int most_tile) {
  StripTiling tiling;
  const int strips = own_tokens > 0 ? int_ceil_div(own_tokens, kStrip) : 1;
  const int padded = other_tokens > 0 ? int_ceil_div(other_tokens, kStrip) * kStrip : kStrip;
  tiling.tile = padded < most_tile ? padded : most_tile;
  tiling.tiles = int_ceil_div(other_tokens, tiling.tile);
  const int slots = tiling.tiles > 1 ? 2 : 1;
  for (int most = most_warps; most > 0; --most) {
    tiling.row_blocks = int_ceil_div(strips, most);
    tiling.strips = int_ceil_div(strips, tiling.row_blocks);
    tiling.heads = tiling.tiles <= 1 && tiling.row_blocks == 1 && tiling.strips * 2 <= most &&
                           tiling.strips < 4
                       ? (most < 4 ? most : 4) / tiling.strips
                       : 1;
    tiling.shared_bytes =
        (tiling.warps() * kStrip * own + slots * tiling.heads * tiling.tile * other) * row_bytes;
    if (tiling.shared_bytes <= kSharedBudget) break;
  }
  return tiling;
}

// Bytes of a row of `dim` features of `size` bytes in shared memory: 16 more than a multiple of 32.
constexpr int row_bytes_of(int dim, int size) { return (dim * size + 31) / 32 * 32 + 16; }

// attention_fwd: warps of a block, and blocks that the registers of a multiprocessor should hold:
// 16 warps where 128 registers suffice, else 12 (168 registers) or 8.
constexpr int forward_warps(int dim, int size, bool stats) {
  return size == 2 && dim <= 64 && !stats ? 8 : 4;
}
constexpr int forward_blocks(int dim, int size, bool stats) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  const int most = stats ? 32 : 64;  // here statistics of 64 features want more than 168
#else
  const int most = 64;
#endif
  return forward_warps(dim, size, stats) == 4 && dim <= most ? 3 : 2;
}
// Tokens of a tile; forward, a warp holds the scores of all its keys in registers.
constexpr int tile_tokens(int size) { return size == 4 ? 32 : 64; }

inline StripTiling forward_tiling(int64_t queries, int64_t keys, int dim, int size, bool stats) {
  return tile_strips(queries, keys, 1, 2, row_bytes_of(dim, size), forward_warps(dim, size, stats),
                     tile_tokens(size));
}

// attention_fwd of 16-bit elements with queries in registers: 16-token strips of a warp, and blocks
// that the registers of a multiprocessor should hold (128 registers: 4, 168: 3, 255: 2).
constexpr int kStripWarps = 4;
constexpr int forward_strips(int dim) { return dim <= 64 ? 2 : 1; }
template <int DIM>
constexpr int kForwardStrips = forward_strips(DIM);
constexpr int strips_blocks(int dim, bool full) { return full ? 2 : dim <= 32 ? 4 : 3; }

// Where tokens lie, in shared memory: pairs of coordinates, of each as many as there are tokens in
// strips. So many bytes have a place beside two tiles of the widest rows.
constexpr int kMostPointBytes = 16 * 1024;
inline int point_planes(const AttentionScores& s, const Positions& positions) {
  return positions.given && positions.first < s.keys ? (positions.dims + 1) / 2 : 0;
}
inline int64_t point_bytes(const AttentionScores& s, const Positions& positions) {
  return int64_t{8} * point_planes(s, positions) * int_ceil_div(s.keys, kStrip) * kStrip;
}

inline StripTiling strips_tiling(const AttentionScores& s, const Positions& positions, int dim,
                                 int size, bool full) {
  StripTiling tiling;
  tiling.own = forward_strips(dim) * kStrip;
  const int row_bytes = row_bytes_of(dim, size);
  const int units = s.queries > 0 ? int_ceil_div(s.queries, tiling.own) : 1;
  tiling.padded = s.keys > 0 ? int_ceil_div(s.keys, kStrip) * kStrip : kStrip;
  tiling.tile = tiling.padded < tile_tokens(size) ? tiling.padded : tile_tokens(size);
  tiling.tiles = int_ceil_div(s.keys, tiling.tile);
  tiling.planes = full ? point_planes(s, positions) : 0;
  for (int most = kStripWarps; most > 0; --most) {
    tiling.row_blocks = int_ceil_div(units, most);
    tiling.strips = int_ceil_div(units, tiling.row_blocks);
    tiling.heads = tiling.tiles <= 1 && tiling.row_blocks == 1 ? most / tiling.strips : 1;
    // The queries and the output have the place of the second tile.
    const int slot = 2 * tiling.heads * tiling.tile * row_bytes;
    const int own = tiling.warps() * tiling.own * row_bytes;
    tiling.head_at = slot + (tiling.tiles > 1 && slot > own ? slot : own);
    tiling.points_at = tiling.head_at + 16;
    tiling.shared_bytes = tiling.points_at + tiling.heads * tiling.planes * tiling.padded * 8;
    if (tiling.shared_bytes <= kSharedBudget) break;
  }
  return tiling;
}

// attention_bwd, where `own` are the tokens whose strips warps own.
constexpr int kBackwardWarps = 4;
constexpr int backward_blocks(int dim, int size) { return dim <= 64 && size == 2 ? 3 : 2; }

inline StripTiling backward_tiling(int64_t own, int64_t others, int dim, int size) {
  return tile_strips(own, others, 2, 2, row_bytes_of(dim, size), kBackwardWarps, tile_tokens(size));
}

// The gradient of a shared bias: a block owns strips of 16 queries by groups of 16 keys, one of
// each per warp, with two heads' rows of queries and of keys in shared memory, two matrices each.
struct BiasTiling {
  int strips = 4;
  int groups = 2;
  int row_blocks = 0;
  int key_blocks = 0;
  int shared_bytes = 0;

  int warps() const { return strips * groups; }
};

inline BiasTiling bias_tiling(int64_t queries, int64_t keys, int dim, int size) {
  BiasTiling tiling;
  const auto bytes = [&] {
    return 4 * (tiling.strips + tiling.groups) * kStrip * row_bytes_of(dim, size);
  };
  while (bytes() > kSharedBudget) {
    (tiling.strips > tiling.groups ? tiling.strips : tiling.groups) /= 2;
  }
  tiling.shared_bytes = bytes();
  tiling.row_blocks = int_ceil_div(queries, tiling.strips * kStrip);
  tiling.key_blocks = int_ceil_div(keys, tiling.groups * kStrip);
  return tiling;
}

// Sums of dS by [windows, heads, Nq, Nk], those of a bias or of one head each for a table: of the
// images of a window, `per_group` at a time, so that there are blocks enough on a large device; a
// constant, so that every device adds in the same order.
constexpr int64_t kSumBlocks = 1024;

struct ScoreSums {
  int windows = 1;
  int heads = 1;
  int groups = 1;
  int per_group = 0;
  int64_t elements = 0;  // of a group
  int64_t blocks = 0;    // of all

  ScoreSums(const AttentionScores& s, int64_t of_windows, int64_t of_heads)
      : windows(static_cast<int>(of_windows)), heads(static_cast<int>(of_heads)) {
    const int size = s.dtype == DType::kFloat32 ? 4 : 2;
    const BiasTiling tiling = bias_tiling(s.queries, s.keys, static_cast<int>(s.dim), size);
    elements = of_windows * of_heads * s.queries * s.keys;
    blocks = of_windows * of_heads * tiling.row_blocks * tiling.key_blocks;
    const int64_t images = of_windows > 0 ? s.batch / of_windows : 0;
    if (images == 0 || blocks == 0) return;
    const int wanted = int_ceil_div(kSumBlocks, blocks);
    per_group = int_ceil_div(images, wanted);
    groups = int_ceil_div(images, per_group);
    blocks *= groups;
  }
};

// What rounding took from lse, for those below: a warp has 16 queries and 16 keys in shared memory.
constexpr int kLowWarps = 4;
constexpr int low_shared_bytes(int dim, int size) {
  return kLowWarps * 2 * kStrip * row_bytes_of(dim, size);
}

// received_attention
constexpr int kReceivedWarps = 4;

inline StripTiling received_tiling(int64_t queries, int64_t keys, int dim, int size) {
  return tile_strips(keys, queries, 1, 1, row_bytes_of(dim, size), kReceivedWarps,
                     tile_tokens(size));
}

// head_divergence: a block compares half of its heads with the other half. Shared memory has two
// heads' 16 queries and 16 keys per warp, and nine words per lane and head.
constexpr int kDivergenceWarps = 4;
constexpr int kDivergenceHeads = 8;

struct DivergenceTiling {
  int warps = kDivergenceWarps;
  int shared_bytes = 0;

  DivergenceTiling(int dim, int size) {
    const auto bytes = [&] {
      return 2 * (1 + warps) * kStrip * row_bytes_of(dim, size) +
             warps * kDivergenceHeads * 9 * 32 * 4;
    };
    while (bytes() > kSharedBudget) {
      warps /= 2;
    }
    shared_bytes = bytes();
  }
};

}  // namespace mimkernels::cuda

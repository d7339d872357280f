// How the launchers of attention cut their work: every warp owns a strip of 16 tokens of one side
// (queries, or keys) and sees the tokens of the other side tile by tile, through shared memory.
#pragma once

#include <cstdint>

#include "core/attention.h"

namespace mimkernels::cuda {

constexpr int kStrip = 16;
// Shared memory that a block can have on every architecture from sm_80 on.
constexpr int kSharedBudget = 99 * 1024;

struct StripCut {
  int row_blocks = 1;  // blocks that share the strips of a head
  int strips = 1;      // of each of its heads that a block owns
  int heads = 1;       // of a block
  int tile = kStrip;   // tokens of the other side that are visited at a time
  int tiles = 0;
  int shared_bytes = 0;

  int warps() const { return heads * strips; }
  unsigned blocks(int all_heads) const {
    return static_cast<unsigned>((all_heads + heads - 1) / heads) *
           static_cast<unsigned>(row_blocks);
  }
};

inline int cut_up(int64_t count, int64_t size) {
  return static_cast<int>((count + size - 1) / size);
}

// A strip has `own` rows of shared memory and a tile `other` rows per token, of `row_bytes` each.
// Two tiles are in flight. Short heads share a block, so that blocks have four warps or more.
inline StripCut cut_strips(int64_t own_tokens, int64_t other_tokens, int own, int other,
                           int row_bytes, int most_warps, int most_tile) {
  StripCut cut;
  const int strips = own_tokens > 0 ? cut_up(own_tokens, kStrip) : 1;
  const int padded = other_tokens > 0 ? cut_up(other_tokens, kStrip) * kStrip : kStrip;
  cut.tile = padded < most_tile ? padded : most_tile;
  cut.tiles = cut_up(other_tokens, cut.tile);
  const int slots = cut.tiles > 1 ? 2 : 1;
  for (int most = most_warps; most > 0; --most) {
    cut.row_blocks = cut_up(strips, most);
    cut.strips = cut_up(strips, cut.row_blocks);
    cut.heads = cut.tiles <= 1 && cut.row_blocks == 1 && cut.strips * 2 <= most && cut.strips < 4
                    ? (most < 4 ? most : 4) / cut.strips
                    : 1;
    cut.shared_bytes =
        (cut.warps() * kStrip * own + slots * cut.heads * cut.tile * other) * row_bytes;
    if (cut.shared_bytes <= kSharedBudget) break;
  }
  return cut;
}

}  // namespace mimkernels::cuda

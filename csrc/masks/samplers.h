// Block masks, a batch at a time. A mask is height x width bytes (frames before both), row by row, 1 = inside a block.
// mimkernels/data/masks/reference.py states the same algorithms, number by number.
#pragma once

#include <cstdint>
#include <vector>

#include "masks/stream.h"

namespace mimkernels::masks {

struct Batch {
  std::vector<uint32_t> samples;
  uint64_t seed = 0;
  uint64_t epoch = 0;

  int64_t size() const { return static_cast<int64_t>(samples.size()); }
};

struct Range {
  double low, high;
};

// Rectangles added until a target is reached (BEiT).
struct BlockParams {
  int height, width;
  std::vector<Range> targets;       // patches to mask; a sample draws from one of them
  bool whole;                       // the number drawn is rounded down
  double min_patches, max_patches;  // of a rectangle
  Range log_aspect;
  bool exact;  // then single patches up to the target
};

// `picks`: which of the targets each sample draws from, -1 = any. Writes samples x height x width bytes.
void blocks(const Batch& batch, const BlockParams& params, const int32_t* picks, uint8_t* out);

// One rectangle of exactly `count` patches (CAPI).
struct RectangleParams {
  int height, width;
  int count;
  Range log_aspect;  // such that every rectangle fits
  bool
      any_corner;  // what it has above `count` is missing at any corner, or always at the bottom right
  bool roll;       // shift the mask around the borders
};

void rectangles(const Batch& batch, const RectangleParams& params, uint8_t* out);

struct Size {
  int frames, height, width;
};

// Target blocks, and a context block without them (I-JEPA); frames are 1.
struct MultiblockParams {
  int height, width;
  Size target, context;
  int targets;
  int min_keep;   // a block has more patches than this
  bool last_row;  // whether a block may end at the last row and column
  bool overlap;   // the context keeps what targets cover
};

// Writes samples x height x width bytes, 1 = context, and samples x targets x (top, left).
void multiblock(const Batch& batch, const MultiblockParams& params, uint8_t* context,
                int32_t* corners);

// The union of blocks of a video (V-JEPA).
struct Multiblock3dParams {
  Size grid, block;
  int blocks;
  int context_frames;  // frames beyond are masked as well
};

// Writes samples x frames x height x width bytes, 1 = masked. Stops at a sample of which none of `tries` draws left
// a patch visible, and returns its place in the batch; -1 if there is none.
int64_t multiblock3d(const Batch& batch, const Multiblock3dParams& params, int tries, uint8_t* out);

// Leaves `count` of the ones of each row of `tokens` bytes, every subset as likely as any other.
void thin(const Batch& batch, int64_t tokens, int count, Purpose purpose, uint8_t* mask);

// Of each row of `tokens` bytes: the places of its zeros, then those of its ones, ascending; where each place stands in
// that order; and how many zeros there are.
void ids(const uint8_t* mask, int64_t rows, int64_t tokens, int64_t* order, int64_t* restore,
         int64_t* zeros);

}  // namespace mimkernels::masks

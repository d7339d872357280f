#include "masks/samplers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "masks/stream.h"

namespace mimkernels::masks {
namespace {

constexpr int kTries = 10;         // rectangles that may be refused in a row (BEiT)
constexpr int kContextTries = 20;  // context blocks before a target may be overlapped (I-JEPA)

// Half to even, as Python rounds.
int rounded(double value) { return static_cast<int>(std::nearbyint(value)); }

struct Grid {
  uint8_t* cells;
  int height, width;

  int64_t tokens() const { return static_cast<int64_t>(height) * width; }
  uint8_t* row(int y) const { return cells + static_cast<int64_t>(y) * width; }

  int count(int top, int left, int h, int w) const {
    int ones = 0;
    for (int y = top; y < top + h; ++y) {
      const uint8_t* const cell = row(y) + left;
      for (int x = 0; x < w; ++x) ones += cell[x];
    }
    return ones;
  }

  void fill(int top, int left, int h, int w, uint8_t value) const {
    for (int y = top; y < top + h; ++y) {
      std::memset(row(y) + left, value, static_cast<size_t>(w));
    }
  }
};

// Sets `count` of the cells that are `from` to 1 - from, every subset as likely as any other.
void flip_some(Stream& stream, uint8_t* cells, int64_t tokens, uint8_t from, int count,
               std::vector<int>& ids) {
  ids.resize(static_cast<size_t>(tokens));
  int available = 0;
  for (int64_t i = 0; i < tokens; ++i) {  // always written, counted where it fits: no branch
    ids[available] = static_cast<int>(i);
    available += cells[i] == from;
  }
  for (int k = 0; k < count; ++k) {
    std::swap(ids[k], ids[k + stream.below(available - k)]);
    cells[ids[k]] = static_cast<uint8_t>(1 - from);
  }
}

// Adds one rectangle of at most `cap` new patches; how many it added, 0 if none of the tries fits.
int add_rectangle(Stream& stream, const BlockParams& params, double cap, const Grid& grid) {
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const double area = stream.uniform(params.min_patches, cap);
    const double aspect = std::exp(stream.uniform(params.log_aspect.low, params.log_aspect.high));
    const uint32_t vertical = stream.word(), horizontal = stream.word();
    const int h = rounded(std::sqrt(area * aspect));
    const int w = rounded(std::sqrt(area / aspect));
    if (h >= grid.height || w >= grid.width) continue;
    const int top = static_cast<int>(static_cast<uint64_t>(vertical) * (grid.height - h + 1) >> 32);
    const int left =
        static_cast<int>(static_cast<uint64_t>(horizontal) * (grid.width - w + 1) >> 32);
    const int added = h * w - grid.count(top, left, h, w);
    if (0 < added && added <= cap) {
      grid.fill(top, left, h, w, 1);
      return added;
    }
  }
  return 0;
}

double drawn_target(Stream& stream, const BlockParams& params, int32_t pick) {
  const int choices = static_cast<int>(params.targets.size());
  if (pick < 0) pick = stream.below(choices);
  const Range range = params.targets[pick];
  const double target = range.low == range.high ? range.low : stream.uniform(range.low, range.high);
  return params.whole ? std::floor(target) : target;
}

}  // namespace

void blocks(const Batch& batch, const BlockParams& params, const int32_t* picks, uint8_t* out) {
  std::vector<int> ids;
  for (int64_t i = 0; i < batch.size(); ++i) {
    Grid grid{out, params.height, params.width};
    grid.cells += i * grid.tokens();
    grid.fill(0, 0, params.height, params.width, 0);
    Stream stream(batch.seed, batch.epoch, batch.samples[i], Purpose::kMask);
    const double target = drawn_target(stream, params, picks[i]);
    int count = 0;
    while (count < target) {
      const double cap = std::min(target - count, params.max_patches);
      const int added = add_rectangle(stream, params, cap, grid);
      if (added == 0) break;
      count += added;
    }
    if (params.exact) {
      flip_some(stream, grid.cells, grid.tokens(), 0, static_cast<int>(target) - count, ids);
    }
  }
}

void rectangles(const Batch& batch, const RectangleParams& params, uint8_t* out) {
  const int height = params.height, width = params.width, count = params.count;
  for (int64_t i = 0; i < batch.size(); ++i) {
    const Grid grid{out + i * static_cast<int64_t>(height) * width, height, width};
    grid.fill(0, 0, height, width, 0);
    Stream stream(batch.seed, batch.epoch, batch.samples[i], Purpose::kMask);
    const double aspect = std::exp(stream.uniform(params.log_aspect.low, params.log_aspect.high));
    int h = std::min(static_cast<int>(std::ceil(std::sqrt(count * aspect))), height);
    int w = std::min(static_cast<int>(std::ceil(std::sqrt(count / aspect))), width);
    while (h * w < count && w < width) ++w;  // a product that rounding left below
    while (h * w < count) ++h;
    int top = stream.below(height - h + 1), left = stream.below(width - w + 1);
    const uint32_t corner = params.any_corner ? stream.word() >> 30 : 0;
    if (params.roll) {
      top += stream.below(height);
      left += stream.below(width);
    }
    for (int k = 0; k < count; ++k) {
      const int y = corner & 1 ? h - 1 - k / w : k / w, x = corner & 2 ? w - 1 - k % w : k % w;
      grid.row((top + y) % height)[(left + x) % width] = 1;
    }
  }
}

void multiblock(const Batch& batch, const MultiblockParams& params, uint8_t* context,
                int32_t* corners) {
  const int beyond = params.last_row ? 1 : 0;
  for (int64_t i = 0; i < batch.size(); ++i) {
    Grid grid{context, params.height, params.width};
    grid.cells += i * grid.tokens();
    int32_t* const corner = corners + i * params.targets * 2;
    Stream stream(batch.seed, batch.epoch, batch.samples[i], Purpose::kMask);
    for (int k = 0; k < params.targets; ++k) {
      corner[2 * k] = stream.below(params.height - params.target.height + beyond);
      corner[2 * k + 1] = stream.below(params.width - params.target.width + beyond);
    }
    int kept_out = params.overlap ? 0 : params.targets;  // targets that the context leaves out
    for (int attempt = 1;; ++attempt) {
      const int top = stream.below(params.height - params.context.height + beyond);
      const int left = stream.below(params.width - params.context.width + beyond);
      grid.fill(0, 0, params.height, params.width, 0);
      grid.fill(top, left, params.context.height, params.context.width, 1);
      for (int k = 0; k < kept_out; ++k) {
        grid.fill(corner[2 * k], corner[2 * k + 1], params.target.height, params.target.width, 0);
      }
      if (grid.count(0, 0, params.height, params.width) > params.min_keep) break;
      if (kept_out == 0)
        break;  // then no draw has more: the caller has seen that the block alone has enough
      if (attempt % kContextTries == 0) --kept_out;
    }
  }
}

int64_t multiblock3d(const Batch& batch, const Multiblock3dParams& params, int tries,
                     uint8_t* out) {
  const Size grid = params.grid, block = params.block;
  const int64_t frame = static_cast<int64_t>(grid.height) * grid.width,
                tokens = frame * grid.frames;
  const int64_t visible_frames = std::min(grid.frames, params.context_frames);
  for (int64_t i = 0; i < batch.size(); ++i) {
    uint8_t* const cells = out + i * tokens;
    Stream stream(batch.seed, batch.epoch, batch.samples[i], Purpose::kMask);
    bool visible = false;
    for (int attempt = 0; attempt < tries && !visible; ++attempt) {
      std::memset(cells, 0, static_cast<size_t>(tokens));
      for (int k = 0; k < params.blocks; ++k) {
        const int top = stream.below(grid.height - block.height + 1);
        const int left = stream.below(grid.width - block.width + 1);
        const int start = stream.below(grid.frames - block.frames + 1);
        for (int t = start; t < start + block.frames; ++t) {
          const Grid at{cells + t * frame, grid.height, grid.width};
          at.fill(top, left, block.height, block.width, 1);
        }
      }
      std::memset(cells + visible_frames * frame, 1,
                  static_cast<size_t>(tokens - visible_frames * frame));
      visible = std::memchr(cells, 0, static_cast<size_t>(tokens)) != nullptr;
    }
    if (!visible) return i;
  }
  return -1;
}

void thin(const Batch& batch, int64_t tokens, int count, Purpose purpose, uint8_t* mask) {
  std::vector<int> ids;
  for (int64_t i = 0; i < batch.size(); ++i) {
    uint8_t* const cells = mask + i * tokens;
    Stream stream(batch.seed, batch.epoch, batch.samples[i], purpose);
    const int ones = static_cast<int>(std::count(cells, cells + tokens, uint8_t{1}));
    flip_some(stream, cells, tokens, 1, std::max(ones - count, 0), ids);
  }
}

void ids(const uint8_t* mask, int64_t rows, int64_t tokens, int64_t* order, int64_t* restore,
         int64_t* zeros) {
  for (int64_t i = 0; i < rows; ++i, mask += tokens, order += tokens, restore += tokens) {
    const int64_t first_one = std::count(mask, mask + tokens, uint8_t{0});
    zeros[i] = first_one;
    int64_t ones = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      const int64_t place = mask[n] ? first_one + ones : n - ones;
      ones += mask[n];
      restore[n] = place;
      order[place] = n;
    }
  }
}

}  // namespace mimkernels::masks

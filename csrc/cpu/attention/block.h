// What the attention kernels share: how work is split, scratch memory, score rows with bias and
// masks, distances between tokens.
#pragma once

#include "core/attention.h"
#include "cpu/attention/tile.h"

namespace mimkernels::MIMKERNELS_ISA {

// ---- cutting ----

// `count` rows in tiles of at most kRowTile whose sizes differ by at most one: 50 rows are nine
// tiles of 5 or 6, none of them nearly empty.
struct RowTiles {
  int64_t count = 0;
  int64_t tiles = 0;

  explicit RowTiles(int64_t rows) : count(rows), tiles(ceil_div(rows, kRowTile)) {}
  int64_t first(int64_t tile) const { return count * tile / max_of(tiles, 1); }
};

// Keys in blocks of at most `most`, as equal as whole panels of `panel` keys allow.
struct KeyBlocks {
  int64_t count = 0;
  int64_t size = 0;
  int64_t blocks = 0;

  KeyBlocks(int64_t keys, int64_t most, int64_t panel = kPanel) : count(keys) {
    const int64_t wanted = max_of(1, ceil_div(keys, most));
    size = max_of(ceil_div(ceil_div(keys, wanted), panel) * panel, panel);
    blocks = ceil_div(keys, size);
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return min_of(size, count - block * size); }
};

// Into how many chunks the rows of one head are split so that few heads still feed many threads.
// Depends on the shape alone: results must not depend on the number of threads.
MIMKERNELS_INLINE int64_t row_chunks(int64_t heads, int64_t rows, int64_t least_rows,
                                     int64_t tasks) {
  return max_of(1, min_of(ceil_div(tasks, max_of(heads, 1)), rows / least_rows));
}

// A power of two goes into the rows, exactly; any other scale is applied to the finished products,
// so that 16-bit inputs keep their exact products. All of it where rows are read as they are.
struct SplitScale {
  float rows = 1.0f;
  float products = 1.0f;

  explicit SplitScale(float scale, bool copies_rows = true) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof(bits));
    const bool power = (bits & 0x007fffffu) == 0 && scale != 0.0f && scale - scale == 0.0f;
    (power && copies_rows ? rows : products) = scale;
  }
};

// How many products over the features are summed at a time. Products that are rounded need short
// sums, whose rounding errors are smaller.
MIMKERNELS_INLINE int64_t product_run(int64_t dim) { return kFused ? dim : min_of(dim, 16); }

// The same of a score. A few queries or keys can afford short sums; BLAS libraries do the same
// there.
MIMKERNELS_INLINE int64_t score_run(const AttentionScores& scores) {
  const bool few = min_of(scores.queries, scores.keys) < 16;
  return few ? min_of(scores.dim, 16) : product_run(scores.dim);
}

// ---- scratch memory ----

// Memory that a thread keeps between calls: fresh pages cost more than the attention of a small
// ViT.
class ThreadMemory {
 public:
  ~ThreadMemory() { free(data_); }
  // At least `bytes`, cache-line aligned; null when the system has none left.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = 0;
      data_ = aligned_alloc(64, bytes);
      if (data_ != nullptr) size_ = bytes;
    }
    return data_;
  }
  // Gives large memory back.
  void trim() {
    if (size_ <= kKept) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t{4} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline thread_local ThreadMemory thread_memory;

// Hands out pieces of one block: first every piece is measured, then the block is reserved, then
// the same calls return memory.
class Arena {
 public:
  ~Arena() {
    if (base_ != nullptr) thread_memory.trim();
  }
  template <typename E>
  E* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(max_of(count, 0)) * sizeof(E) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<E*>(base_ + at);
  }
  float* floats(int64_t count) { return take<float>(count); }
  // False when there is no memory.
  bool reserve() {
    base_ = static_cast<char*>(thread_memory.reserve(max_of(static_cast<int64_t>(used_), 64)));
    used_ = 0;
    return base_ != nullptr;
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

// ---- inputs ----

template <typename T>
MIMKERNELS_INLINE const T* head_at(const HeadRows& rows, int64_t b, int64_t h, int64_t token) {
  return static_cast<const T*>(rows.data) + b * rows.stride_batch + h * rows.stride_head +
         token * rows.stride_token;
}

// Asks for rows of features that will be needed soon: they lie too far apart for the hardware to
// guess.
template <typename T>
MIMKERNELS_INLINE void prefetch_rows(const T* src, int64_t stride, int64_t rows, int64_t dim) {
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < rows; ++i) {
    const char* row = reinterpret_cast<const char*>(src + i * stride);
    for (int64_t at = 0; at < bytes; at += 64) prefetch(row + at);
  }
}

MIMKERNELS_INLINE const uint8_t* mask_of(const BoolMask& mask, int64_t b) {
  return mask.given ? mask.data + b * mask.stride0 : nullptr;
}

// 0 where a key may be attended, -inf where it may not, and -inf on the padding.
MIMKERNELS_INLINE void fill_mask_row(const uint8_t* allowed, int64_t keys, int64_t padded,
                                     float* dst) {
  for (int64_t j = 0; j < keys; ++j)
    dst[j] = allowed == nullptr || allowed[j] != 0 ? 0.0f : -kInfinity;
  for (int64_t j = keys; j < padded; ++j) dst[j] = -kInfinity;
}

// The bias of some query rows in fp32, -inf where mask_row is.
template <typename T>
void fill_bias_rows(const T* bias, int64_t stride, int64_t rows, int64_t keys,
                    const float* mask_row, float* dst, int64_t dst_stride) {
  const Floats never = splat(-kInfinity);
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = bias + i * stride;
    float* to = dst + i * dst_stride;
    for (int64_t j = 0; j < keys; j += kLanes) {
      const bool whole = keys - j >= kLanes;
      const Floats value =
          whole ? load_part<kLanes>(from + j) : load_some<kLanes>(from + j, keys - j).v[0];
      const Ints off = (Ints)(load_floats(mask_row + j) < 0.0f);
      store_floats(to + j, choose_lanes(off, never, value));
    }
  }
}

// The start of a block's scores: nothing, the mask, or bias and mask. `scores` receives the bias
// rows.
class ScoreStart {
 public:
  explicit ScoreStart(const AttentionScores& p) : p_(p) {}

  // Keys [first, first + count) of image b, head h; mask_row has room for them, padded.
  void set_block(float* mask_row, int64_t b, int64_t h, int64_t first, int64_t count) {
    mask_row_ = mask_row;
    b_ = b;
    h_ = h;
    first_ = first;
    count_ = count;
    const uint8_t* allowed = mask_of(p_.key_mask, b);
    fill_mask_row(allowed == nullptr ? nullptr : allowed + first, count, padded_columns(count),
                  mask_row_);
  }

  template <int kStride, typename E>
  void set_rows(ScoreTile<E>& tile, int64_t query, int64_t rows) const {
    tile.tail_start = mask_row_ + count_ / kPanel * kPanel;
    const Rows start = rows_of(query, rows, 0, count_, tile.scores, kStride);
    tile.start = start.first;
    tile.start_stride = start.stride;
  }

  struct Rows {
    const float* first = nullptr;  // null: nothing, not even a mask
    int64_t stride = 0;
  };

  // The start of some queries' scores, `keys` of them from `key` of the block on, padded to whole
  // registers. Bias rows are put into `room`, room_stride apart.
  Rows rows_of(int64_t query, int64_t rows, int64_t key, int64_t keys, float* room,
               int64_t room_stride) const {
    if (!p_.bias.given) return {p_.key_mask.given ? mask_row_ + key : nullptr, 0};
    const int64_t offset = b_ * p_.bias.stride_batch + h_ * p_.bias.stride_head +
                           query * p_.bias.stride_query + first_ + key;
    with_float_type(p_.bias.dtype, [&](auto type) {
      using T = decltype(type);
      fill_bias_rows(static_cast<const T*>(p_.bias.data) + offset, p_.bias.stride_query, rows, keys,
                     mask_row_ + key, room, room_stride);
      return Status{};
    });
    return {room, room_stride};
  }

  // 0 or -inf for the keys of the block from `key` on, and -inf on the padding.
  const float* mask_row(int64_t key) const { return mask_row_ + key; }

 private:
  const AttentionScores& p_;
  float* mask_row_ = nullptr;
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t first_ = 0;
  int64_t count_ = 0;
};

// ---- distances ----

// Rows of the distance matrix, made when asked for. Short ones are kept as long as the image stays
// the same, so that its heads share them.
class Distances {
 public:
  static constexpr int64_t kKeptTokens = 272;

  Distances(const Positions& positions, int64_t tokens, int64_t num_prefix, int64_t block_rows)
      : positions_(positions),
        tokens_(positions.given ? tokens : 0),
        num_prefix_(num_prefix),
        block_rows_(block_rows),
        stride_(padded_columns(tokens_)),
        kept_(tokens_ > 0 && tokens_ <= kKeptTokens) {}

  void allocate(Arena& arena) {
    points_ = arena.floats(3 * stride_);
    matrix_ = arena.floats((kept_ ? tokens_ : block_rows_) * stride_);
    made_ = arena.floats(kept_ ? tokens_ : 0);
  }

  void set_image(int64_t b) {
    const int64_t image = positions_.stride_batch == 0 ? 0 : b;
    if (tokens_ == 0 || image == image_) return;
    image_ = image;
    const float* src = positions_.data + image * positions_.stride_batch;
    for (int d = 0; d < positions_.dims; ++d) {
      float* dst = points_ + d * stride_;
      const int64_t first = positions_.first;
      for (int64_t j = 0; j < first; ++j) dst[j] = 0.0f;
      for (int64_t j = first; j < tokens_; ++j) {
        dst[j] = src[(j - first) * positions_.stride_token + d];
      }
      for (int64_t j = tokens_; j < stride_; ++j) dst[j] = 0.0f;
    }
    if (kept_) memset(made_, 0, static_cast<size_t>(tokens_) * sizeof(float));
  }

  // Distances of token i to all keys of [first, first + padded count), 0 to and from prefix tokens.
  // `slot` tells apart the rows of a block.
  const float* row(int64_t i, int64_t slot, int64_t first, int64_t count) {
    if (!kept_) {
      float* dst = matrix_ + slot * stride_;
      fill(i, first, min_of(first + padded_columns(count), stride_), dst);
      return dst + first;
    }
    float* dst = matrix_ + i * stride_;
    if (made_[i] == 0.0f) {
      fill(i, 0, stride_, dst);
      made_[i] = 1.0f;
    }
    return dst + first;
  }

 private:
  void fill(int64_t i, int64_t begin, int64_t end, float* dst) const {
    if (i < num_prefix_) {
      memset(dst + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
      return;
    }
    for (int64_t j = begin; j < end; j += kLanes) {
      Floats square = {};
      for (int d = 0; d < positions_.dims; ++d) {
        const float* x = points_ + d * stride_;
        const Floats step = load_floats(x + j) - splat(x[i]);
        square = mul_add(step, step, square);
      }
      store_floats(dst + j, root(square));
    }
    for (int64_t j = begin; j < min_of(end, num_prefix_); ++j) dst[j] = 0.0f;
  }

  Positions positions_;
  int64_t tokens_;
  int64_t num_prefix_;
  int64_t block_rows_;
  int64_t stride_;
  bool kept_;
  int64_t image_ = -1;
  float* points_ = nullptr;
  float* matrix_ = nullptr;
  float* made_ = nullptr;
};

}  // namespace mimkernels::MIMKERNELS_ISA

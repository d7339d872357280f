// What the attention kernels share: how work is split, score rows with bias and masks, distances
// between tokens.
#pragma once

#include "core/attention.h"
#include "cpu/attention/arena.h"
#include "cpu/attention/table.h"
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

// ---- inputs ----

template <typename T>
MIMKERNELS_INLINE const T* head_at(const HeadRows& rows, int64_t b, int64_t h, int64_t token) {
  return static_cast<const T*>(rows.data) + b * rows.stride_batch + h * rows.stride_head +
         token * rows.stride_token;
}

template <typename T>
MIMKERNELS_INLINE float dot_row(const T* a, const T* b, int64_t dim) {
  Floats sum = {};
  for (int64_t c = 0; c < dim; c += kLanes)
    sum = mul_add(load_columns(a + c, dim - c), load_columns(b + c, dim - c), sum);
  return add_lanes(sum);
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

// rows += table, -inf where mask_row is. With kFirst the rows hold nothing yet.
template <bool kFirst>
MIMKERNELS_INLINE void add_table_row(const float* table, int64_t keys, const float* mask_row,
                                     float* row) {
  const Floats never = splat(-kInfinity);
  for (int64_t j = 0; j < keys; j += kLanes) {
    Floats value = load_floats(table + j);
    if constexpr (!kFirst) value += load_floats(row + j);
    const Ints off = (Ints)(load_floats(mask_row + j) < 0.0f);
    store_floats(row + j, choose_lanes(off, never, value));
  }
}

// The start of a block's scores: nothing, the mask, or biases and mask.
class ScoreStart {
 public:
  explicit ScoreStart(const AttentionScores& p) : p_(p), table_(p) {}

  void allocate(Arena& arena) {
    table_.allocate(arena);
    made_row_ = arena.floats(table_.given() && !table_.kept() ? table_.stride() : 0);
  }

  // Whether rows of biases are made, for which the caller has room.
  static bool makes_rows(const AttentionScores& p) { return p.bias.given || p.table.given; }

  // Keys [first, first + count) of image b, head h; mask_row has room for them, padded.
  void set_block(float* mask_row, int64_t b, int64_t h, int64_t first, int64_t count) {
    mask_row_ = mask_row;
    b_ = b;
    h_ = h;
    first_ = first;
    count_ = count;
    table_.set_head(h);
    const uint8_t* allowed = mask_of(p_.key_mask, b);
    fill_mask_row(allowed == nullptr ? nullptr : allowed + first, count, padded_columns(count),
                  mask_row_);
  }

  template <int kStride, typename E>
  void set_rows(ScoreTile<E>& tile, int64_t query, int64_t rows) {
    tile.tail_start = mask_row_ + count_ / kPanel * kPanel;
    const Rows start = rows_of(query, rows, 0, count_, tile.scores, kStride);
    tile.start = start.first;
    tile.start_stride = start.stride;
    if (!p_.cosine.given) return;
    tile.row_factors = row_factors(query);
    tile.column_factors = column_factors(0);
  }

  // row *= the factors of cosine attention of a query and `keys` keys of the block from `key` on,
  // whole registers of it.
  void apply_factors(int64_t query, int64_t key, int64_t keys, float* row) const {
    const Floats factor = splat(*row_factors(query));
    const float* const columns = column_factors(key);
    for (int64_t j = 0; j < keys; j += kLanes) {
      store_floats(row + j, load_floats(row + j) * factor * load_floats(columns + j));
    }
  }

  struct Rows {
    const float* first = nullptr;  // null: nothing, not even a mask
    int64_t stride = 0;
  };

  // The start of some queries' scores, `keys` of them from `key` of the block on, padded to whole
  // registers. Rows that are made are put into `room`, room_stride apart.
  Rows rows_of(int64_t query, int64_t rows, int64_t key, int64_t keys, float* room,
               int64_t room_stride) {
    if (p_.bias.given) {
      const int64_t offset = b_ % p_.bias.windows * p_.bias.stride_batch +
                             h_ * p_.bias.stride_head + query * p_.bias.stride_query + first_ + key;
      (void)with_float_type(p_.bias.dtype, [&](auto type) {
        using T = decltype(type);
        fill_bias_rows(static_cast<const T*>(p_.bias.data) + offset, p_.bias.stride_query, rows,
                       keys, mask_row_ + key, room, room_stride);
        return Status{};
      });
      if (table_.given()) add_table<false>(query, rows, key, keys, room, room_stride);
      return {room, room_stride};
    }
    if (!table_.given()) return {p_.key_mask.given ? mask_row_ + key : nullptr, 0};
    if (table_.kept() && !p_.key_mask.given) {
      for (int64_t i = 0; i < rows; ++i) table_.row(query + i);
      return {table_.row(query) + first_ + key, table_.stride()};
    }
    add_table<true>(query, rows, key, keys, room, room_stride);
    return {room, room_stride};
  }

  // 0 or -inf for the keys of the block from `key` on, and -inf on the padding.
  const float* mask_row(int64_t key) const { return mask_row_ + key; }

 private:
  const float* row_factors(int64_t query) const {
    return p_.cosine.rows + (b_ * p_.heads + h_) * p_.queries + query;
  }
  const float* column_factors(int64_t key) const {
    return p_.cosine.columns + (b_ * p_.heads + h_) * p_.cosine.column_stride + first_ + key;
  }

  template <bool kFirst>
  void add_table(int64_t query, int64_t rows, int64_t key, int64_t keys, float* room,
                 int64_t room_stride) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = made_row_;
      if (table_.kept()) {
        row = table_.row(query + i) + first_ + key;
      } else {
        table_.fill(query + i, first_ + key, keys, made_row_);
      }
      add_table_row<kFirst>(row, keys, mask_row_ + key, room + i * room_stride);
    }
  }

  const AttentionScores& p_;
  TableRows table_;
  float* made_row_ = nullptr;
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
  static constexpr int64_t kKeptTokens = 640;

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
    switch (positions_.dims) {
      case 1:
        fill_as<1>(i, begin, end, dst);
        break;
      case 2:
        fill_as<2>(i, begin, end, dst);
        break;
      default:
        fill_as<3>(i, begin, end, dst);
    }
    for (int64_t j = begin; j < min_of(end, num_prefix_); ++j) dst[j] = 0.0f;
  }

  template <int kDims>
  void fill_as(int64_t i, int64_t begin, int64_t end, float* dst) const {
    const float* points[kDims];
    Floats here[kDims];
    for (int d = 0; d < kDims; ++d) {
      points[d] = points_ + d * stride_;
      here[d] = splat(points[d][i]);
    }
    for (int64_t j = begin; j < end; j += kLanes) {
      Floats square = {};
      MIMKERNELS_UNROLL
      for (int d = 0; d < kDims; ++d) {
        const Floats step = load_floats(points[d] + j) - here[d];
        square = d == 0 ? step * step : mul_add(step, step, square);
      }
      store_floats(dst + j, root(square));
    }
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

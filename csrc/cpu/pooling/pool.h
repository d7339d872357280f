// The building blocks of the pooling ops: which tokens are pooled, blocks of their rows in fp32,
// and the three products of a block with a few vectors.
#pragma once

#include "core/token_pool.h"
#include "cpu/attention/math.h"
#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Tokens at a time: their rows stay in the first-level cache from one product to the next.
constexpr int kBlock = 8;

// Images in fewer pieces than this leave threads idle: their tokens are split into chunks.
constexpr int64_t kLeastTasks = 16;
constexpr int64_t kLeastChunk = 32;

// How the tokens of an image are split. Depends on sizes alone, so that results do not depend on
// the number of threads.
struct Chunks {
  Chunks(int64_t batch, int64_t tokens_) : tokens(tokens_) {
    const int64_t wanted = ceil_div(kLeastTasks, max_of(batch, 1));
    const int64_t most = max_of(1, tokens / kLeastChunk);
    length = max_of(1, ceil_div(tokens, min_of(wanted, most)));
    count = max_of(1, ceil_div(tokens, length));
  }
  int64_t begin(int64_t chunk) const { return chunk * length; }
  int64_t end(int64_t chunk) const { return min_of(tokens, (chunk + 1) * length); }

  int64_t tokens = 0;
  int64_t length = 0;
  int64_t count = 0;
};

MIMKERNELS_INLINE bool is_allowed(const BoolMask& mask, int64_t num_prefix, int64_t b, int64_t n) {
  return n >= num_prefix && (!mask.given || mask.data[b * mask.stride0 + n] != 0);
}

// Up to kBlock tokens.
struct Block {
  int64_t token[kBlock];
  int count = 0;
};

// Walks the allowed tokens of [begin, end), a block at a time.
class TokenBlocks {
 public:
  TokenBlocks(const BoolMask& mask, int64_t num_prefix, int64_t b, int64_t begin, int64_t end)
      : mask_(mask), num_prefix_(num_prefix), b_(b), at_(max_of(begin, num_prefix)), end_(end) {
    find();
  }

  // Moves to the next block; false at the end.
  MIMKERNELS_INLINE bool next() {
    block_ = upcoming_;
    find();
    return block_.count > 0;
  }
  const Block& block() const { return block_; }
  // The block after it, empty at the end.
  const Block& upcoming() const { return upcoming_; }

 private:
  MIMKERNELS_INLINE void find() {
    upcoming_.count = 0;
    for (; at_ < end_ && upcoming_.count < kBlock; ++at_) {
      if (is_allowed(mask_, num_prefix_, b_, at_)) upcoming_.token[upcoming_.count++] = at_;
    }
  }

  const BoolMask& mask_;
  int64_t num_prefix_;
  int64_t b_;
  int64_t at_;
  int64_t end_;
  Block block_;
  Block upcoming_;
};

// Rows that are asked for while others are computed with, one beside each tile of a product (four
// where a block has few tiles): asked for all at once, they would be waited for.
class Ahead {
 public:
  // `rows` stand in where there is nothing to ask for: they are in the cache.
  explicit Ahead(const float* const* rows) : here_(reinterpret_cast<const char*>(rows[0])) {}
  template <typename T>
  MIMKERNELS_INLINE void add(const Rows& x, int64_t b, const Block& block, T) {
    for (int i = 0; i < block.count; ++i) {
      row_[count_++] = reinterpret_cast<const char*>(row_at<T>(x, b, block.token[i]));
    }
    size_ = static_cast<int64_t>(sizeof(T));
  }
  // The next row to ask for.
  MIMKERNELS_INLINE const char* take() { return taken_ < count_ ? row_[taken_++] : here_; }
  // Asks for the first lines of the rows to come, before work that asks for nothing.
  MIMKERNELS_INLINE void ask_heads(int64_t bytes) const {
    for (int64_t i = taken_; i < count_; ++i) prefetch_row(row_[i], bytes, bytes);
  }
  // Again from the first row, for other columns.
  MIMKERNELS_INLINE void rewind() { taken_ = 0; }
  // Bytes of an element.
  int64_t size() const { return size_; }

 private:
  const char* here_;
  const char* row_[2 * kBlock];
  int64_t count_ = 0;
  int64_t taken_ = 0;
  int64_t size_ = 0;
};

// The rows of a block in fp32: where they lie, or converted into `buffer` [kBlock, dim]. Places
// beyond `count` repeat the first row.
using BlockRows = const float* [kBlock];

template <typename T>
MIMKERNELS_INLINE void block_rows(const Rows& x, int64_t b, const Block& block, int64_t dim,
                                  float* buffer, BlockRows& rows) {
  for (int i = 0; i < kBlock; ++i) {
    if (i >= block.count) {
      rows[i] = rows[0];
      continue;
    }
    const T* row = row_at<T>(x, b, block.token[i]);
    if constexpr (std::is_same_v<T, float>) {
      rows[i] = row;
    } else {
      set_acc(buffer + i * dim, row, dim);
      rows[i] = buffer + i * dim;
    }
  }
}

// ---- columns of a row, a few registers at a time ----

template <int N>
MIMKERNELS_INLINE Pack<N> fused(const Pack<N>& a, const Pack<N>& b, Pack<N> c) {
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    if constexpr (Pack<N>::kWidth == kLanes) {
      c.v[p] = mul_add(a.v[p], b.v[p], c.v[p]);
    } else {
      c.v[p] = a.v[p] * b.v[p] + c.v[p];
    }
  }
  return c;
}

template <int kSize, bool kIsWhole>
struct Columns {
  static constexpr int size = kSize;
  static constexpr bool whole = kIsWhole;
};

// Calls body(Columns, first, count) for runs of kMost columns, then smaller ones.
template <int kMost, typename Body>
MIMKERNELS_INLINE void for_columns(int64_t dim, const Body& body) {
  int64_t c = 0;
  for (; c + kMost <= dim; c += kMost) body(Columns<kMost, true>{}, c, kMost);
  if constexpr (kMost > 16) {
    for (; c + 16 <= dim; c += 16) body(Columns<16, true>{}, c, 16);
  }
  if (c + 8 <= dim) {
    body(Columns<8, true>{}, c, 8);
    c += 8;
  }
  if (c < dim) body(Columns<8, false>{}, c, dim - c);
}

// ---- products of a block's rows [kBlock, dim] with vectors [count, dim] ----

// Rows that a tile asks for: with one vector, a product is one tile.
template <int kVectors>
constexpr int kAhead = kVectors == 1 ? 4 : 1;

// out[v * kBlock + r] (+)= the products of columns [from, to); asks for the next
// rows of `ahead`.
template <int kRows, int kVectors>
MIMKERNELS_INLINE void dot_tile(const float* const* rows, const float* vectors, int64_t stride,
                                int64_t from, int64_t to, bool add, Ahead& ahead, float* out) {
  Floats acc[kRows][kVectors];
  MIMKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = (Floats){};
  }
  const char* next[kAhead<kVectors>];
  MIMKERNELS_UNROLL
  for (int i = 0; i < kAhead<kVectors>; ++i) next[i] = ahead.take();
  const int64_t size = ahead.size();
  int64_t c = from;
  const auto step = [&]() MIMKERNELS_LAMBDA_INLINE {
    Floats right[kVectors];
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load_floats(vectors + v * stride + c);
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Floats left = load_floats(rows[r] + c);
      MIMKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = mul_add(left, right[v], acc[r][v]);
    }
    c += kLanes;
  };
  constexpr int kStepsPerLine = 16 / kLanes;
  // Unrolled further, GCC would load the vectors once per row instead of once.
#pragma GCC unroll 1
  while (c + 16 <= to) {
    MIMKERNELS_UNROLL
    for (int i = 0; i < kAhead<kVectors>; ++i) prefetch(next[i] + c * size);
    MIMKERNELS_UNROLL
    for (int i = 0; i < kStepsPerLine; ++i) step();
  }
#pragma GCC unroll 1
  while (c + kLanes <= to) step();
  MIMKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float sum = add_lanes(acc[r][v]);
      for (int64_t i = c; i < to; ++i) sum += rows[r][i] * vectors[v * stride + i];
      out[v * kBlock + r] = add ? out[v * kBlock + r] + sum : sum;
    }
  }
}

// Columns that are summed at a time. A lane adds at most 64 products, so that rounding errors stay
// small; beside many vectors, a block's rows must also stay in the first-level cache.
constexpr int64_t kDotRun = 64 * kLanes;
constexpr int64_t kDotRunOfMany = kDotRun < 384 ? kDotRun : 384;

// out[v * kBlock + i] = rows[i] . vectors[v * stride ...].
inline void block_dots(const BlockRows& rows, const float* vectors, int64_t stride, int64_t count,
                       int64_t dim, Ahead& ahead, float* out) {
  const int64_t triples = count / 3;
  const int64_t run = count == 1 ? kDotRun : kDotRunOfMany;
  for (int64_t from = 0; from == 0 || from < dim; from += run) {
    const int64_t to = min_of(dim, from + run);
    const bool add = from > 0;
    ahead.rewind();
    const float* some = vectors;
    float* into = out;
    for (int64_t t = 0; t < triples; ++t, some += 3 * stride, into += 3 * kBlock) {
      dot_tile<4, 3>(rows, some, stride, from, to, add, ahead, into);
      dot_tile<4, 3>(rows + 4, some, stride, from, to, add, ahead, into + 4);
    }
    if (count % 3 == 2) {
      dot_tile<4, 2>(rows, some, stride, from, to, add, ahead, into);
      dot_tile<4, 2>(rows + 4, some, stride, from, to, add, ahead, into + 4);
    } else if (count % 3 == 1) {
      dot_tile<8, 1>(rows, some, stride, from, to, add, ahead, into);
    }
  }
}

template <int kVectors, int kMost>
MIMKERNELS_INLINE void weigh_tile(const BlockRows& rows, int count, const float* weights,
                                  const float* factors, int64_t dim, Ahead& ahead, float* acc,
                                  int64_t stride) {
  const char* next[kAhead<kVectors>];
  MIMKERNELS_UNROLL
  for (int i = 0; i < kAhead<kVectors>; ++i) next[i] = ahead.take();
  const int64_t size = ahead.size();
  for_columns<kMost>(dim, [&](auto columns, int64_t c, int64_t n) MIMKERNELS_LAMBDA_INLINE {
    constexpr int kSize = decltype(columns)::size;
    constexpr bool kWhole = decltype(columns)::whole;
    MIMKERNELS_UNROLL
    for (int i = 0; i < kAhead<kVectors>; ++i) {
      MIMKERNELS_UNROLL
      for (int at = 0; at < kSize; at += 16) prefetch(next[i] + (c + at) * size);
    }
    // The block's own sum comes first: rounding errors grow with the number of blocks, not tokens.
    Pack<kSize> sum[kVectors];
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] = broadcast<kSize>(0.0f);
    for (int i = 0; i < count; ++i) {
      const Pack<kSize> row = load_columns<kSize, kWhole>(rows[i] + c, n);
      MIMKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[v] = fused(broadcast<kSize>(weights[v * kBlock + i]), row, sum[v]);
      }
    }
    MIMKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Pack<kSize> before = load_columns<kSize, kWhole>(acc + v * stride + c, n);
      sum[v] = fused(before, broadcast<kSize>(factors[v]), sum[v]);
      store_columns<kSize, kWhole, false>(acc + v * stride + c, sum[v], n);
    }
  });
}

// acc[v, :] = acc[v, :] * factors[v] + sum over i < count of weights[v * kBlock + i] * rows[i].
inline void block_weigh(const BlockRows& rows, int count, const float* weights,
                        const float* factors, int64_t vectors, int64_t dim, Ahead& ahead,
                        float* acc, int64_t stride) {
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4) {
    weigh_tile<4, 16>(rows, count, weights + v * kBlock, factors + v, dim, ahead, acc + v * stride,
                      stride);
  }
  for (; v < vectors; ++v) {
    weigh_tile<1, 32>(rows, count, weights + v * kBlock, factors + v, dim, ahead, acc + v * stride,
                      stride);
  }
}

// Values of which query g has its own slice: column g * width + c of rows and acc.
inline void block_weigh_slices(const BlockRows& rows, int count, const float* weights,
                               const float* factors, int64_t vectors, int64_t width, float* acc) {
  BlockRows slice;
  for (int64_t v = 0; v < vectors; ++v) {
    for (int i = 0; i < kBlock; ++i) slice[i] = rows[i] + v * width;
    Ahead nothing(slice);
    weigh_tile<1, 32>(slice, count, weights + v * kBlock, factors + v, width, nothing,
                      acc + v * width, 0);
  }
}

inline void block_dots_slices(const BlockRows& rows, const float* vectors, int64_t count,
                              int64_t width, float* out) {
  BlockRows slice;
  for (int64_t v = 0; v < count; ++v) {
    for (int i = 0; i < kBlock; ++i) slice[i] = rows[i] + v * width;
    Ahead nothing(slice);
    block_dots(slice, vectors + v * width, 0, 1, width, nothing, out + v * kBlock);
  }
}

// What the rows of a gradient are made of: out[i, :] = sum over v of weights[v * kBlock + i] *
// vectors[v, :], plus, where slices are given, slice_weights[g * kBlock + i] * slices[g * width +
// c] in the columns of each slice g.
struct Spread {
  const float* vectors = nullptr;
  const float* weights = nullptr;
  int64_t count = 0;
  int64_t stride = 0;  // of vectors
  const float* slices = nullptr;
  const float* slice_weights = nullptr;
  int64_t width = 0;
  int64_t dim = 0;
};

template <int kRows, bool kStream, typename T>
MIMKERNELS_INLINE void spread_tile(const Spread& s, int first, int64_t from, int64_t dim,
                                   const float* slice_weights, const int64_t* token, T* out) {
  for_columns<16>(dim, [&](auto columns, int64_t at, int64_t n) MIMKERNELS_LAMBDA_INLINE {
    constexpr int kSize = decltype(columns)::size;
    constexpr bool kWhole = decltype(columns)::whole;
    const int64_t c = from + at;
    Pack<kSize> sum[kRows];
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = broadcast<kSize>(0.0f);
    if (slice_weights != nullptr) {
      const Pack<kSize> right = load_columns<kSize, kWhole>(s.slices + c, n);
      MIMKERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] = broadcast<kSize>(slice_weights[first + r]) * right;
      }
    }
    for (int64_t v = 0; v < s.count; ++v) {
      const Pack<kSize> right = load_columns<kSize, kWhole>(s.vectors + v * s.stride + c, n);
      MIMKERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] = fused(broadcast<kSize>(s.weights[v * kBlock + first + r]), right, sum[r]);
      }
    }
    MIMKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      store_columns<kSize, kWhole, kStream>(out + token[first + r] * s.dim + c, sum[r], n);
    }
  });
}

// Into the block's rows of out [*, dim]; rounded once. Every element is written.
template <bool kStream, typename T>
void block_spread(const Spread& s, const Block& block, T* out) {
  if (s.slices == nullptr) {
    int i = 0;
    for (; i + 4 <= block.count; i += 4) {
      spread_tile<4, kStream>(s, i, 0, s.dim, nullptr, block.token, out);
    }
    for (; i < block.count; ++i) {
      spread_tile<1, kStream>(s, i, 0, s.dim, nullptr, block.token, out);
    }
    return;
  }
  // Row by row, so that whole cache lines are written at a time.
  for (int i = 0; i < block.count; ++i) {
    for (int64_t g = 0; g * s.width < s.dim; ++g) {
      spread_tile<1, kStream>(s, i, g * s.width, s.width, s.slice_weights + g * kBlock, block.token,
                              out);
    }
  }
}

}  // namespace mimkernels::MIMKERNELS_ISA

// The forward of bf16 attention by products in tiles: the same results as Worker of cpu_fwd.cpp, to
// the same contract.
//
// numerics: scores and P v as matrix_tiles.h says, so subnormal numbers of q, k, v and P count as 0;
//           P is rounded to bf16 for P v alone, and comes from ShortExp; in out, too, subnormal
//           numbers become 0; the rest as in cpu_fwd.cpp
// cost:     K^T and V of a head are packed once, for all its queries. 32 queries at a time meet up
//           to 512 keys in 2 x 2 tiles: their scores stay in L1 or L2, and become P, in the cache of
//           a few rows, once their maximum is known; beyond 512 keys sums and P v are rescaled from
//           block to block. The products of the next 32 keys are issued before the scores of the last
//           are finished, so that tiles and vectors may overlap. So reasoned, not
//           measured
// order:    as in cpu_fwd.cpp
#pragma once

#include "cpu/attention/matrix_tiles.h"
#include "ops/attention/cpu_fwd_rows.h"

namespace mimkernels::MIMKERNELS_ISA {

class TileForward;

#if defined(MIMKERNELS_MATRIX_TILES)

class TileForward {
  static constexpr int64_t kQueries = 2 * kTileRows;     // at a time
  static constexpr int64_t kColumns = 2 * kTileColumns;  // of scores that are finished at a time
  // Strides, all of an odd number of cache lines: rows of a tile fall into different cache sets.
  // That is why queries are copied, whose own stride is often a multiple of 2 KiB.
  static constexpr int64_t kScoreStride = kBlockKeys + kTileColumns;
  static constexpr int64_t kWeightStride = kBlockKeys + kTileDepth;
  static constexpr int64_t kQueryStride = kMaxDim + kTileDepth;
  static constexpr int64_t kResultStride = kMaxDim + kTileColumns;
  static_assert(kBlockKeys % kTileDepth == 0);

 public:
  explicit TileForward(const AttentionFwdParams& params)
      : p_(params),
        s_(params.scores),
        groups_(ceil_div(s_.queries, kQueries)),
        blocks_(s_.keys, kBlockKeys, kTileDepth),
        steps_(ceil_div(s_.dim, kTileDepth)),
        order_(s_),
        chunks_(min_of(row_chunks(order_.count(), s_.queries, kLeastRows, kTasks), groups_)),
        unscaled_(!ScoreStart::makes_rows(s_) && !s_.cosine.given && ShortExp::takes(s_.scale)),
        softmax_(params, ceil_div(groups_, chunks_) * kQueries, unscaled_ ? s_.scale : 1.0f) {}

  int64_t tasks() const { return order_.count() * chunks_; }

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    // The features that pad them to whole tiles stay 0.
    memset(query_, 0, kQueries * kQueryStride * sizeof(bf16));
    return true;
  }

  void run(int64_t task) {
    const int64_t head = task / chunks_;
    const int64_t chunk = task % chunks_;
    b_ = order_.image(head);
    h_ = order_.head(head);
    next_.set(order_, head, blocks_.blocks == 1 && chunk + 1 == chunks_);
    if (packed_head_ != head) pack();
    packed_head_ = head;
    const int64_t first = groups_ * chunk / chunks_ * kQueries;
    const int64_t last = min_of(groups_ * (chunk + 1) / chunks_ * kQueries, s_.queries);
    softmax_.set_task(b_, h_, first);
    for (int64_t row = first; row < last; row += kQueries) {
      visit_rows(row, min_of(kQueries, last - row));
    }
    softmax_.finish(first, last - first);
  }

 private:
  void allocate() {
    keys_ = arena_.take<bf16>(tiles_transposed_size(s_.keys, s_.dim));
    values_ = arena_.take<bf16>(tiles_rows_size(s_.keys, s_.dim));
    query_ = arena_.take<bf16>(kQueries * kQueryStride);
    scores_ = arena_.floats(kQueries * kScoreStride);
    weights_ = arena_.take<bf16>(kQueries * kWeightStride);
    result_ = arena_.floats(kQueries * kResultStride);
    bias_ = arena_.floats(ScoreStart::makes_rows(s_) ? kQueries * kColumns : 0);
    maxima_ = arena_.floats(kQueries * kLanes);
    mask_row_ = arena_.floats(padded_columns(s_.keys));
    start_.allocate(arena_);
    softmax_.allocate(arena_);
  }

  void pack() {
    start_.set_block(mask_row_, b_, h_, 0, s_.keys);
    pack_tiles_transposed(head_at<bf16>(s_.k, b_, h_, 0), s_.k.stride_token, s_.keys, s_.dim,
                          mask_of(s_.key_mask, b_), keys_);
    pack_tiles_rows(head_at<bf16>(p_.v, b_, h_, 0), p_.v.stride_token, s_.keys, s_.dim, values_);
  }

  void visit_rows(int64_t row, int64_t rows) {
    copy_queries(row, rows);
    const int64_t out_stride = s_.heads * s_.dim;
    bf16* out = static_cast<bf16*>(p_.out) + ((b_ * s_.queries + row) * s_.heads + h_) * s_.dim;
    for (int64_t block = 0; block < blocks_.blocks; ++block) {
      const int64_t first = blocks_.first(block);
      const int64_t count = blocks_.length(block);
      if (block == 0) {
        next_.prefetch(s_.q, row, rows);
        next_.prefetch(s_.k, row, rows);
      }
      score_rows(row, rows, first, count);
      if (block == 0) {
        next_.prefetch(p_.v, row, rows);
        prefetch_rows(out, out_stride, rows, s_.dim);
        const int64_t more = min_of(kQueries, s_.queries - row - rows);
        prefetch_rows(head_at<bf16>(s_.q, b_, h_, row + rows), s_.q.stride_token, more, s_.dim);
      }
      weigh_rows(row, rows, first, count);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = softmax_.sum(row + i);
      round_row(out + i * out_stride, result_ + i * kResultStride, s_.dim,
                sum == 0.0f ? 0.0f : 1.0f / sum);
    }
  }

  // What earlier queries left in the rows past the last stays there: nobody reads their results.
  void copy_queries(int64_t row, int64_t rows) {
    const bf16* from = head_at<bf16>(s_.q, b_, h_, row);
    for (int64_t i = 0; i < rows; ++i, from += s_.q.stride_token) {
      copy_features(from, s_.dim, query_ + i * kQueryStride);
    }
  }

  // The scores of keys [first, first + count), and each lane's maximum.
  void score_rows(int64_t row, int64_t rows, int64_t first, int64_t count) {
    const int64_t columns = ceil_div(count, kTileColumns);
    TileProduct product;
    product.a = query_;
    product.a_stride = kQueryStride;
    product.b_panel = steps_ * kTileSize;
    product.b = keys_ + first / kTileColumns * product.b_panel;
    product.c = scores_;
    product.c_stride = kScoreStride;
    product.steps = steps_;
    const auto multiply_pair = [&](int64_t column) {
      TileProduct pair = product;
      pair.b += column * product.b_panel;
      pair.c += column * kTileColumns;
      multiply_all_tiles<false>(pair, ceil_div(rows, kTileRows), min_of(2, columns - column));
    };
    multiply_pair(0);
    for (int64_t column = 0; column < columns; column += 2) {
      if (column + 2 < columns) multiply_pair(column + 2);
      finish_scores(row, rows, first, count, column * kTileColumns);
    }
  }

  // scores = scale * products (+ start), kColumns of them from `at` on, and the maxima of lanes;
  // products stay as they are where nothing is added to them but a mask: their exponential scales
  // them.
  void finish_scores(int64_t row, int64_t rows, int64_t first, int64_t count, int64_t at) {
    const int64_t keys = min_of(kColumns, count - at);
    for (int64_t i = 0; s_.cosine.given && i < rows; ++i) {
      start_.apply_factors(row + i, first + at, keys, scores_ + i * kScoreStride + at);
    }
    ScoreStart::Rows start = start_.rows_of(row, rows, first + at, keys, bias_, kColumns);
    // The last register holds keys that are not there.
    if (start.first == nullptr && keys % kLanes != 0) start.first = start_.mask_row(first + at);
    const int64_t width = padded_columns(keys);
    if (start.first != nullptr) {
      const Floats scale = splat(unscaled_ ? 1.0f : s_.scale);
      visit_scores(rows, at, width,
                   [&](float* scores, int64_t i, int64_t j) MIMKERNELS_LAMBDA_INLINE {
                     const Floats begin = load_floats(start.first + i * start.stride + j);
                     const Floats score = mul_add(load_floats(scores), scale, begin);
                     store_floats(scores, score);
                     return score;
                   });
    } else if (unscaled_) {
      visit_scores(rows, at, width, [](float* scores, int64_t, int64_t) MIMKERNELS_LAMBDA_INLINE {
        return load_floats(scores);
      });
    } else {
      const Floats scale = splat(s_.scale);
      visit_scores(rows, at, width, [&](float* scores, int64_t, int64_t) MIMKERNELS_LAMBDA_INLINE {
        const Floats score = load_floats(scores) * scale;
        store_floats(scores, score);
        return score;
      });
    }
  }

  // The maxima of what score(its place, row, column less `at`) gives for `width` columns from `at`
  // on.
  template <typename Score>
  MIMKERNELS_INLINE void visit_scores(int64_t rows, int64_t at, int64_t width, const Score& score) {
    float* scores = scores_ + at;
    float* maxima = maxima_;
    const auto visit = [&](int64_t columns) MIMKERNELS_LAMBDA_INLINE {
      for (int64_t i = 0; i < rows; ++i, scores += kScoreStride, maxima += kLanes) {
        Floats best = at == 0 ? splat(-kInfinity) : load_floats(maxima);
        MIMKERNELS_UNROLL
        for (int64_t j = 0; j < columns; j += kLanes) {
          best = max_or_second(score(scores + j, i, j), best);
        }
        store_floats(maxima, best);
      }
    };
    width == kColumns ? visit(kColumns) : visit(width);
  }

  // P of finished scores, and P v, in result_.
  void weigh_rows(int64_t row, int64_t rows, int64_t first, int64_t count) {
    const int64_t padded = padded_columns(count);
    const int64_t steps = ceil_div(count, kTileDepth);
    float rescale[kQueries];
    for (int64_t i = 0; i < rows; i += kRowTile) {
      softmax_.visit({row + i, min_of(kRowTile, rows - i), first, count, scores_ + i * kScoreStride,
                      weights_ + i * kWeightStride, maxima_ + i * kLanes},
                     rescale + i);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = padded; j < steps * kTileDepth; j += 8) {
        memset(weights_ + i * kWeightStride + j, 0, 8 * sizeof(bf16));
      }
    }
    TileProduct product;
    product.a = weights_;
    product.a_stride = kWeightStride;
    product.b_panel = ceil_div(s_.keys, kTileDepth) * kTileSize;
    product.b = values_ + first / kTileDepth * kTileSize;
    product.c = result_;
    product.c_stride = kResultStride;
    product.steps = steps;
    const int64_t row_tiles = ceil_div(rows, kTileRows);
    const int64_t column_tiles = ceil_div(s_.dim, kTileColumns);
    if (first == 0) return multiply_all_tiles<false>(product, row_tiles, column_tiles);
    for (int64_t i = 0; i < rows; ++i) {
      float* result = result_ + i * kResultStride;
      write_row(result, result, padded_columns(s_.dim), rescale[i]);
    }
    multiply_all_tiles<true>(product, row_tiles, column_tiles);
  }

  TilesInUse tiles_in_use_;
  const AttentionFwdParams& p_;
  const AttentionScores& s_;
  int64_t groups_;  // of kQueries
  KeyBlocks blocks_;
  int64_t steps_;  // of tiles that hold the features
  HeadOrder order_;
  NextHead<bf16> next_{s_};
  int64_t chunks_;
  bool unscaled_;  // scores are products until their exponential is taken
  RowSoftmax<bf16, kScoreStride, kWeightStride, true> softmax_;
  ScoreStart start_{s_};
  Arena arena_;
  int64_t packed_head_ = -1;
  int64_t b_ = 0;
  int64_t h_ = 0;
  bf16* keys_ = nullptr;
  bf16* values_ = nullptr;
  bf16* query_ = nullptr;
  float* scores_ = nullptr;
  bf16* weights_ = nullptr;
  float* result_ = nullptr;
  float* bias_ = nullptr;
  float* maxima_ = nullptr;
  float* mask_row_ = nullptr;
};

#endif  // MIMKERNELS_MATRIX_TILES

}  // namespace mimkernels::MIMKERNELS_ISA

// out = softmax(S) v, lse, and the row statistics asked for, S = scale * q k^T + biases; or, with
// logit_scale, exp(min(logit_scale, ln 100)) cos(q, k) + biases.
//
// in:       q, k, v by strides, features contiguous, fp32, bf16 or fp16; bias, bias table and its
//           index, key mask, positions
// out:      out [B, Nq, H, D]; lse [B, H, Nq] and statistics in fp32; every element written once
// numerics: everything in fp32; scores and statistics are taken relative to the row's maximum, so
//           that entropies lose nothing to cancellation. Where bf16 has a dot product of its own, P
//           is rounded to bf16 for P v alone; products of bf16 in tiles: cpu_fwd_tiles.h
// cost:     keys and values are packed once per block of 512 keys and stay in L2, the scores of a
//           few rows in L1; up to 512 keys a row's softmax is final at once, beyond that it is
//           rescaled from block to block
// order:    a row's sums depend on its keys alone: the same bits for any number of threads, and the
//           same out and lse whichever statistics are asked for
#include "cpu/attention/cosine.h"
#include "cpu/kernels.h"
#include "ops/attention/cpu_fwd_rows.h"
#include "ops/attention/cpu_fwd_tiles.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int kStride = kBlockKeys + 16;  // between score rows; an odd number of cache lines

struct Visit {
  int64_t b = -1;
  int64_t h = -1;
  int64_t block = -1;
};

// What one thread works with.
template <typename T>
class Worker {
  using E = Operand<T>;
  // Rows of q are read where they lie, unless they must be converted.
  static constexpr bool kInPlace = std::is_same_v<E, T>;

 public:
  explicit Worker(const AttentionFwdParams& params)
      : p_(params),
        s_(params.scores),
        tiles_(s_.queries),
        blocks_(s_.keys, kBlockKeys),
        order_(s_),
        chunks_(row_chunks(order_.count(), s_.queries, kLeastRows, kTasks)),
        task_rows_(ceil_div(s_.queries, chunks_) + 2 * kRowTile),
        softmax_(params, task_rows_) {}

  int64_t tasks() const { return order_.count() * chunks_; }

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  void run(int64_t task) {
    const int64_t head = task / chunks_;
    const int64_t chunk = task % chunks_;
    b_ = order_.image(head);
    h_ = order_.head(head);
    next_.set(order_, head, blocks_.blocks == 1 && chunk + 1 == chunks_);
    const int64_t begin = tiles_.tiles * chunk / chunks_;
    const int64_t end = tiles_.tiles * (chunk + 1) / chunks_;
    first_row_ = tiles_.first(begin);
    softmax_.set_task(b_, h_, first_row_);
    for (int64_t block = 0; block < blocks_.blocks; ++block) {
      pack(block);
      for (int64_t tile = begin; tile < end; ++tile) {
        visit_rows(tiles_.first(tile), tiles_.first(tile + 1) - tiles_.first(tile), block);
      }
    }
    softmax_.finish(first_row_, tiles_.first(end) - first_row_);
  }

 private:
  void allocate() {
    const int64_t block = blocks_.size;
    keys_ = arena_.take<E>(block * s_.dim);
    values_ = arena_.take<E>(block * padded_columns(s_.dim));
    scores_ = arena_.floats(kRowTile * kStride);
    weights_ = arena_.take<E>(kDepth<E> > 1 ? kRowTile * kStride : 0);
    query_ = arena_.take<E>(kInPlace ? 0 : kRowTile * kDimStride);
    result_ = arena_.floats((blocks_.blocks > 1 ? task_rows_ : kRowTile) * kDimStride);
    maxima_ = arena_.floats(kRowTile * kLanes);
    mask_row_ = arena_.floats(block + kPanel);
    start_.allocate(arena_);
    softmax_.allocate(arena_);
  }

  void pack(int64_t block) {
    start_.set_block(mask_row_, b_, h_, blocks_.first(block), blocks_.length(block));
    if (packed_.b == b_ && packed_.h == h_ && packed_.block == block) return;
    packed_ = {b_, h_, block};
    const int64_t first = blocks_.first(block);
    const int64_t count = blocks_.length(block);
    const uint8_t* allowed = mask_of(s_.key_mask, b_);
    pack_transposed(head_at<T>(s_.k, b_, h_, first), s_.k.stride_token, count, s_.dim,
                    allowed == nullptr ? nullptr : allowed + first, keys_);
    pack_rows(head_at<T>(p_.v, b_, h_, first), p_.v.stride_token, count, s_.dim, values_);
  }

  void visit_rows(int64_t row, int64_t rows, int64_t block) {
    const int64_t count = blocks_.length(block);
    ScoreTile<E> tile;
    if constexpr (kInPlace) {
      tile.rows = head_at<T>(s_.q, b_, h_, row);
      tile.row_stride = s_.q.stride_token;
    } else {
      copy_rows(head_at<T>(s_.q, b_, h_, row), s_.q.stride_token, rows, s_.dim, scale_.rows,
                query_);
      tile.rows = query_;
    }
    tile.panels = keys_;
    tile.dim = s_.dim;
    tile.run = score_run(s_);
    tile.keys = count;
    tile.scale = scale_.products;
    tile.scores = scores_;
    tile.maxima = maxima_;
    start_.template set_rows<kStride>(tile, row, rows);
    const int64_t out_stride = s_.heads * s_.dim;
    T* out = static_cast<T*>(p_.out) + ((b_ * s_.queries + row) * s_.heads + h_) * s_.dim;
    const bool last = block + 1 == blocks_.blocks;
    if (last) prefetch_rows(out, out_stride, rows, s_.dim);
    next_.prefetch(s_.q, row, rows);
    next_.prefetch(s_.k, row, rows);
    if (row + 2 * rows <= s_.queries) {
      prefetch_rows(head_at<T>(s_.q, b_, h_, row + rows), s_.q.stride_token, rows, s_.dim);
    }
    with_row_count(rows, [&](auto n) { score_rows<kStride, true, n.value>(tile); });

    float scale[kRowTile];
    softmax_.visit({row, rows, blocks_.first(block), count, scores_, weights(), maxima_}, scale);
    next_.prefetch(p_.v, row, rows);
    float* result = result_ + (blocks_.blocks > 1 ? (row - first_row_) * kDimStride : 0);
    if (block > 0) {
      for (int64_t i = 0; i < rows; ++i) {
        write_row(result + i * kDimStride, result + i * kDimStride, padded_columns(s_.dim),
                  scale[i]);
      }
    }
    for (int64_t i = 0; last && i < rows; ++i) {
      const float sum = softmax_.sum(row + i);
      scale[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
    const auto finish = [&](int r, int64_t c, Floats value) MIMKERNELS_LAMBDA_INLINE {
      if (last) {
        put_columns(out + r * out_stride + c, value * splat(scale[r]), s_.dim - c);
      } else {
        store_floats(result + r * kDimStride + c, value);
      }
    };
    with_row_count(rows, [&](auto n) {
      if (block > 0) {
        weigh_panels<kStride, true, n.value>(weights(), values_, count, s_.dim, result, finish);
      } else {
        weigh_panels<kStride, false, n.value>(weights(), values_, count, s_.dim, result, finish);
      }
    });
  }

  // P as P v reads it.
  E* weights() const {
    if constexpr (kDepth<E> > 1) {
      return weights_;
    } else {
      return scores_;
    }
  }

  const AttentionFwdParams& p_;
  const AttentionScores& s_;
  RowTiles tiles_;
  KeyBlocks blocks_;
  HeadOrder order_;
  NextHead<T> next_{s_};
  int64_t chunks_;
  int64_t task_rows_;
  RowSoftmax<E, kStride, kStride, false> softmax_;
  SplitScale scale_{s_.scale, !kInPlace};
  ScoreStart start_{s_};
  Arena arena_;
  Visit packed_;
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t first_row_ = 0;
  E* keys_ = nullptr;
  E* values_ = nullptr;
  float* scores_ = nullptr;
  E* weights_ = nullptr;
  E* query_ = nullptr;
  float* result_ = nullptr;
  float* maxima_ = nullptr;
  float* mask_row_ = nullptr;
};

// What computes the attention of T.
template <typename T>
using WorkerOf =
    std::conditional_t<kMatrixTiles && std::is_same_v<T, bf16>, TileForward, Worker<T>>;

// No keys at all: zeros, an lse and a largest score of -inf, and no key of it.
template <typename T>
void write_empty(const AttentionFwdParams& p) {
  const AttentionScores& s = p.scores;
  const int64_t rows = s.batch * s.heads * s.queries;
  memset(p.out, 0, static_cast<size_t>(rows * s.dim) * sizeof(T));
  for (int64_t i = 0; i < rows; ++i) {
    p.lse[i] = -kInfinity;
    p.lse_low[i] = 0.0f;
  }
  const int64_t planes = __builtin_popcountll(static_cast<unsigned long long>(p.stats));
  if (planes > 0) memset(p.rows, 0, static_cast<size_t>(planes * rows) * sizeof(float));
  const auto fill = [&](AttentionStat stat, float value) {
    if ((p.stats & stat) == 0) return;
    const auto before = static_cast<unsigned long long>(p.stats & (stat - 1));
    float* plane = p.rows + __builtin_popcountll(before) * rows;
    for (int64_t i = 0; i < rows; ++i) plane[i] = value;
  };
  fill(kMaxScore, -kInfinity);
  fill(kArgmax, -1.0f);
}

}  // namespace

Status attention_fwd(const AttentionFwdParams& params, ParallelFor parallel_for) {
  const AttentionScores& s = params.scores;
  const Status status = check_table(s);
  if (!status.ok()) return status;
  return with_own_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    if (s.batch * s.heads * s.queries == 0) return Status{};
    if (s.keys == 0) {
      write_empty<T>(params);
      return Status{};
    }
    return with_factors<T>(params, parallel_for, [&](const AttentionFwdParams& p) {
      using Chosen = WorkerOf<T>;
      const int64_t tasks = Chosen(p).tasks();
      int failures = 0;
      run_parallel(parallel_for, tasks, 1, [&](int64_t begin, int64_t end) {
        Chosen worker(p);
        if (!worker.reserve()) {
          __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
          return;
        }
        for (int64_t task = begin; task < end; ++task) worker.run(task);
      });
      return failures != 0 ? out_of_memory() : Status{};
    });
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

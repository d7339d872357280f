// What received_attention and head_divergence share: both recompute
//   L = (S - lse) - lse_low and P = exp(L)
// a few rows at a time and keep nothing N x N.
#pragma once

#include "cpu/attention/cosine.h"

namespace mimkernels::MIMKERNELS_ISA {

constexpr int64_t kMapKeys = 512;
constexpr int kMapStride = kMapKeys + 16;

// The scores of a few rows against one block of keys.
template <typename T>
class ScoreRows {
 public:
  explicit ScoreRows(const AttentionScores& scores) : s_(scores), blocks_(scores.keys, kMapKeys) {}

  void allocate(Arena& arena) {
    keys_ = arena.floats(blocks_.size * s_.dim);
    query_ = arena.floats(kRowTile * kDimStride);
    mask_row_ = arena.floats(blocks_.size + kPanel);
    start_.allocate(arena);
  }

  void set_block(int64_t b, int64_t h, int64_t block) {
    b_ = b;
    h_ = h;
    block_ = block;
    const int64_t first = blocks_.first(block);
    const uint8_t* allowed = mask_of(s_.key_mask, b);
    pack_transposed(head_at<T>(s_.k, b, h, first), s_.k.stride_token, blocks_.length(block), s_.dim,
                    allowed == nullptr ? nullptr : allowed + first, keys_);
    start_.set_block(mask_row_, b, h, first, blocks_.length(block));
  }

  // scores: [rows, padded keys], kMapStride apart.
  void compute(int64_t row, int64_t rows, float* scores) {
    copy_rows(head_at<T>(s_.q, b_, h_, row), s_.q.stride_token, rows, s_.dim, scale_.rows, query_);
    ScoreTile<float> tile;
    tile.rows = query_;
    tile.panels = keys_;
    tile.dim = s_.dim;
    tile.run = score_run(s_);
    tile.keys = blocks_.length(block_);
    tile.scale = scale_.products;
    tile.scores = scores;
    start_.template set_rows<kMapStride>(tile, row, rows);
    with_row_count(rows, [&](auto n) { score_rows<kMapStride, false, n.value>(tile); });
  }

  const KeyBlocks& blocks() const { return blocks_; }
  int64_t columns() const { return padded_columns(blocks_.length(block_)); }
  // Where a row of this head is among all rows.
  int64_t at(int64_t row) const { return (b_ * s_.heads + h_) * s_.queries + row; }

 private:
  const AttentionScores& s_;
  KeyBlocks blocks_;
  SplitScale scale_{s_.scale};
  ScoreStart start_{s_};
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t block_ = 0;
  float* keys_ = nullptr;
  float* query_ = nullptr;
  float* mask_row_ = nullptr;
};

// Calls run(task) for every task with a worker per thread.
template <typename Worker, typename Params>
MIMKERNELS_INLINE Status run_tasks(const Params& params, int64_t tasks, ParallelFor parallel_for) {
  int failures = 0;
  run_parallel(parallel_for, tasks, 1, [&](int64_t begin, int64_t end) {
    Worker worker(params);
    if (!worker.reserve()) {
      __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) worker.run(task);
  });
  return failures != 0 ? out_of_memory() : Status{};
}

// lse in two parts, [B, H, Nq] each.
struct RowLogs {
  const float* lse = nullptr;
  const float* low = nullptr;
};

// L of one register of scores of one row.
MIMKERNELS_INLINE Floats log_p(Floats score, const RowLogs& logs, int64_t row) {
  const float lse = logs.lse[row] == -kInfinity ? 0.0f : logs.lse[row];
  return (score - splat(lse)) - splat(logs.low[row]);
}

struct LowParams {
  const AttentionScores& scores;
  const float* lse;
  float* low;
};

// lse_low of some rows of one head: 0 where lse is not large, else from the row's maximum and sum.
template <typename T>
class LowWorker {
 public:
  explicit LowWorker(const LowParams& params) : p_(params), rows_(params.scores) {}

  static int64_t tasks(const AttentionScores& s) {
    return s.batch * s.heads * ceil_div(s.queries, kTaskRows);
  }

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  void run(int64_t task) {
    const AttentionScores& s = p_.scores;
    const int64_t parts = ceil_div(s.queries, kTaskRows);
    const int64_t head = task / parts;
    const int64_t first = task % parts * kTaskRows;
    const int64_t count = min_of(kTaskRows, s.queries - first);
    const float* lse = p_.lse + head * s.queries + first;
    float* low = p_.low + head * s.queries + first;
    const RowTiles tiles(count);
    const auto large = [&](int64_t row) {
      return lse[row] - lse[row] == 0.0f && __builtin_fabsf(lse[row]) > kLargeLse;
    };
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      low[i] = 0.0f;
      any = any || large(i);
      tops_[i] = -kInfinity;
      sums_[i] = 0.0f;
    }
    if (!any) return;
    for (int64_t block = 0; block < rows_.blocks().blocks; ++block) {
      rows_.set_block(head / s.heads, head % s.heads, block);
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const int64_t row = tiles.first(tile);
        const int64_t rows = tiles.first(tile + 1) - row;
        bool needed = false;
        for (int64_t i = row; i < row + rows; ++i) needed = needed || large(i);
        if (!needed) continue;
        rows_.compute(first + row, rows, scores_);
        for (int64_t i = 0; i < rows; ++i) add_row(row + i, scores_ + i * kMapStride);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (large(i)) low[i] = (tops_[i] - lse[i]) + log_lanes(splat(sums_[i]))[0];
    }
  }

 private:
  static constexpr int64_t kTaskRows = 64;

  void add_row(int64_t row, const float* scores) {
    Floats best = splat(tops_[row]);
    for (int64_t j = 0; j < rows_.columns(); j += kLanes) {
      best = max_or_second(load_floats(scores + j), best);
    }
    const float top = max_lanes(best);
    if (top == -kInfinity) return;
    Floats sum = {};
    for (int64_t j = 0; j < rows_.columns(); j += kLanes) {
      sum += exp_lanes(load_floats(scores + j) - splat(top));
    }
    sums_[row] = sums_[row] * exp_lanes(splat(tops_[row] - top))[0] + add_lanes(sum);
    tops_[row] = top;
  }

  void allocate() {
    rows_.allocate(arena_);
    scores_ = arena_.floats(kRowTile * kMapStride);
    tops_ = arena_.floats(kTaskRows);
    sums_ = arena_.floats(kTaskRows);
  }

  const LowParams& p_;
  ScoreRows<T> rows_;
  Arena arena_;
  float* scores_ = nullptr;
  float* tops_ = nullptr;
  float* sums_ = nullptr;
};

// Calls run(RowLogs) once lse_low is there.
template <typename T, typename Run>
MIMKERNELS_INLINE Status with_row_logs(const AttentionScores& s, const float* lse,
                                       ParallelFor parallel_for, const Run& run) {
  Scratch<float> low(s.batch * s.heads * s.queries);
  if (low.failed()) return out_of_memory();
  const LowParams params{s, lse, low.get()};
  const Status status = run_tasks<LowWorker<T>>(params, LowWorker<T>::tasks(s), parallel_for);
  return status.ok() ? run(RowLogs{lse, low.get()}) : status;
}

}  // namespace mimkernels::MIMKERNELS_ISA

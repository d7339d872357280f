// Statistics of the attention map that are no row sums: attention received per key, divergence of
// heads. Both recompute L = (S - lse) - lse_low and P = exp(L) a few rows at a time and keep
// nothing N x N.
//
// in:       q, k by strides, features contiguous; lse [B, H, Nq]; bias, key mask
// out:      received [B, H, Nk] = mean over queries of P_ij; divergence [B, H, H] = mean over
//           queries of KL(P^h || P^g) over the keys that both heads see; fp32, every element
//           written once
// numerics: fp32, compensated sums of received attention over queries, totals of divergence over
//           queries in fp64; sums run in order
// cost:     one pass over the scores, and another over those of rows whose lse is large
#include "cpu/attention_block.h"
#include "cpu/kernels.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int64_t kBlockKeys = 512;
constexpr int kStride = kBlockKeys + 16;
constexpr float kLowest = -3.40282347e38f;  // stands in for log 0 = -inf, so that 0 * log 0 = 0

// The scores of a few rows against one block of keys.
template <typename T>
class ScoreRows {
 public:
  explicit ScoreRows(const AttentionScores& scores)
      : s_(scores), blocks_(scores.keys, kBlockKeys) {}

  void allocate(Arena& arena) {
    keys_ = arena.floats(blocks_.size * s_.dim);
    query_ = arena.floats(kRowTile * kDimStride);
    mask_row_ = arena.floats(blocks_.size + kPanel);
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

  // scores: [rows, padded keys], kStride apart.
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
    start_.template set_rows<kStride>(tile, row, rows);
    with_row_count(rows, [&](auto n) { score_rows<kStride, false, n.value>(tile); });
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
        for (int64_t i = 0; i < rows; ++i) add_row(row + i, scores_ + i * kStride);
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
    scores_ = arena_.floats(kRowTile * kStride);
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

struct ReceivedTasks {
  const ReceivedAttentionParams& params;
  RowLogs logs;
};

// A task is one block of keys of one head, and owns its part of the output.
template <typename T>
class ReceivedWorker {
 public:
  explicit ReceivedWorker(const ReceivedTasks& tasks)
      : p_(tasks.params), logs_(tasks.logs), rows_(p_.scores) {}

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  void run(int64_t task) {
    const AttentionScores& s = p_.scores;
    const KeyBlocks& blocks = rows_.blocks();
    const int64_t block = task % blocks.blocks;
    const int64_t head = task / blocks.blocks;
    rows_.set_block(head / s.heads, head % s.heads, block);
    const int64_t columns = rows_.columns();
    memset(sums_, 0, static_cast<size_t>(columns) * sizeof(float));
    memset(excess_, 0, static_cast<size_t>(columns) * sizeof(float));
    const RowTiles tiles(s.queries);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t row = tiles.first(tile);
      const int64_t rows = tiles.first(tile + 1) - row;
      rows_.compute(row, rows, scores_);
      // Compensated: roundings of like rows all go one way, and would add up.
      for (int64_t j = 0; j < columns; j += kLanes) {
        Floats sum = load_floats(sums_ + j);
        Floats excess = load_floats(excess_ + j);
        for (int64_t i = 0; i < rows; ++i) {
          const Floats p =
              exp_lanes(log_p(load_floats(scores_ + i * kStride + j), logs_, rows_.at(row + i)));
          const Floats part = p - excess;
          const Floats next = sum + part;
          excess = (next - sum) - part;
          sum = next;
        }
        store_floats(sums_ + j, sum);
        store_floats(excess_ + j, excess);
      }
    }
    float* out = p_.out + head * s.keys + blocks.first(block);
    const float queries = static_cast<float>(s.queries);
    for (int64_t j = 0; j < blocks.length(block); ++j) out[j] = sums_[j] / queries;
  }

 private:
  void allocate() {
    rows_.allocate(arena_);
    scores_ = arena_.floats(kRowTile * kStride);
    sums_ = arena_.floats(kStride);
    excess_ = arena_.floats(kStride);
  }

  const ReceivedAttentionParams& p_;
  RowLogs logs_;
  ScoreRows<T> rows_;
  Arena arena_;
  float* scores_ = nullptr;
  float* sums_ = nullptr;
  float* excess_ = nullptr;  // of sums_ over the exact ones
};

// sums[h, g] += sum over columns of p[h, :] * logs[g, :], all heads against all heads, in tiles of
// kSide x kSide heads. Rows are `stride` apart. With kHidden, keys that g does not see, whose
// logarithm is -inf, count with h's own.
constexpr int kSide = 3;

template <bool kHidden, int kRows, int kColumns>
MIMKERNELS_INLINE void cross_tile(const float* p, const float* own, const float* logs,
                                  int64_t stride, int64_t columns, float* sums,
                                  int64_t sums_stride) {
  Floats acc[kRows][kColumns];
  clear(acc);
  for (int64_t j = 0; j < columns; j += kLanes) {
    Floats right[kColumns];
    MIMKERNELS_UNROLL
    for (int g = 0; g < kColumns; ++g) right[g] = load_floats(logs + g * stride + j);
    MIMKERNELS_UNROLL
    for (int h = 0; h < kRows; ++h) {
      const Floats left = load_floats(p + h * stride + j);
      Floats instead = {};
      if constexpr (kHidden) {
        instead = max_or_second(splat(kLowest), load_floats(own + h * stride + j));
      }
      MIMKERNELS_UNROLL
      for (int g = 0; g < kColumns; ++g) {
        Floats log = right[g];
        if constexpr (kHidden) {
          log = choose_lanes((Ints)(log == splat(-kInfinity)), instead, log);
        }
        acc[h][g] = mul_add(left, log, acc[h][g]);
      }
    }
  }
  for (int h = 0; h < kRows; ++h) {
    for (int g = 0; g < kColumns; ++g) sums[h * sums_stride + g] += add_lanes(acc[h][g]);
  }
}

template <bool kHidden>
void cross_heads(const float* p, const float* logs, int64_t stride, int64_t columns, int64_t heads,
                 float* sums) {
  const auto tile = [&](auto rows, auto others, int64_t h, int64_t g) MIMKERNELS_LAMBDA_INLINE {
    cross_tile<kHidden, rows.value, others.value>(p + h * stride, logs + h * stride,
                                                  logs + g * stride, stride, columns,
                                                  sums + h * heads + g, heads);
  };
  int64_t h = 0;
  for (; h + kSide <= heads; h += kSide) {
    int64_t g = 0;
    for (; g + kSide <= heads; g += kSide) tile(Constant<kSide>{}, Constant<kSide>{}, h, g);
    for (; g < heads; ++g) tile(Constant<kSide>{}, Constant<1>{}, h, g);
  }
  for (; h < heads; ++h) {
    for (int64_t g = 0; g < heads; ++g) tile(Constant<1>{}, Constant<1>{}, h, g);
  }
}

struct DivergenceTasks {
  const HeadDivergenceParams& params;
  RowLogs logs;
};

// A task is one image. Rows of all heads are visited together: their P and log P lie side by side.
template <typename T>
class DivergenceWorker {
 public:
  explicit DivergenceWorker(const DivergenceTasks& tasks)
      : p_(tasks.params), row_logs_(tasks.logs), rows_(p_.scores) {}

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  void run(int64_t b) {
    const AttentionScores& s = p_.scores;
    const KeyBlocks& blocks = rows_.blocks();
    const RowTiles tiles(s.queries);
    const int64_t cells = s.heads * s.heads;
    for (int64_t i = 0; i < cells; ++i) totals_[i] = 0.0;
    const int64_t spans = ceil_div(tiles.tiles, kSpanTiles);
    for (int64_t span = 0; span < spans; ++span) {
      const int64_t begin = tiles.tiles * span / spans;
      const int64_t end = tiles.tiles * (span + 1) / spans;
      for (int64_t block = 0; block < blocks.blocks; ++block) visit(b, tiles, begin, end, block);
    }
    float* out = p_.out + b * cells;
    for (int64_t i = 0; i < cells; ++i) {
      out[i] = static_cast<float>(totals_[i] / static_cast<double>(s.queries));
    }
  }

 private:
  static constexpr int64_t kSpanTiles = 8;  // for which the heads' keys are packed once
  static constexpr int64_t kSpanRows = kSpanTiles * kRowTile;

  void visit(int64_t b, const RowTiles& tiles, int64_t begin, int64_t end, int64_t block) {
    const AttentionScores& s = p_.scores;
    const int64_t top = tiles.first(begin);
    const int64_t rows = tiles.first(end) - top;
    const int64_t head_stride = kSpanRows * kStride;
    // Only a bias can hide a key from one head and not from another.
    const bool hides = s.bias.given;
    const Floats least = splat(hides ? -kInfinity : kLowest);
    for (int64_t h = 0; h < s.heads; ++h) {
      rows_.set_block(b, h, block);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tiles.first(tile);
        const int64_t count = tiles.first(tile + 1) - row;
        float* p = weights_ + h * head_stride + (row - top) * kStride;
        float* logs = logs_ + h * head_stride + (row - top) * kStride;
        rows_.compute(row, count, p);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t j = 0; j < rows_.columns(); j += kLanes) {
            const Floats x = log_p(load_floats(p + i * kStride + j), row_logs_, rows_.at(row + i));
            store_floats(logs + i * kStride + j, max_or_second(least, x));
            store_floats(p + i * kStride + j, exp_lanes(x));
          }
        }
      }
    }
    const int64_t cells = s.heads * s.heads;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < cells; ++c) sums_[c] = 0.0f;
      const auto cross = hides ? cross_heads<true> : cross_heads<false>;
      cross(weights_ + i * kStride, logs_ + i * kStride, head_stride, rows_.columns(), s.heads,
            sums_);
      // KL(h || g) = sum P^h log P^h - sum P^h log P^g: nearly equal sums, subtracted before they
      // grow.
      for (int64_t h = 0; h < s.heads; ++h) {
        const float* row = sums_ + h * s.heads;
        for (int64_t g = 0; g < s.heads; ++g)
          totals_[h * s.heads + g] += double{row[h]} - double{row[g]};
      }
    }
  }

  void allocate() {
    const AttentionScores& s = p_.scores;
    rows_.allocate(arena_);
    weights_ = arena_.floats(s.heads * kSpanRows * kStride);
    logs_ = arena_.floats(s.heads * kSpanRows * kStride);
    sums_ = arena_.floats(s.heads * s.heads);
    totals_ = reinterpret_cast<double*>(arena_.floats(2 * s.heads * s.heads));
  }

  const HeadDivergenceParams& p_;
  RowLogs row_logs_;
  ScoreRows<T> rows_;
  Arena arena_;
  float* weights_ = nullptr;
  float* logs_ = nullptr;
  float* sums_ = nullptr;
  double* totals_ = nullptr;
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

}  // namespace

Status received_attention_fwd(const ReceivedAttentionParams& params, ParallelFor parallel_for) {
  const AttentionScores& s = params.scores;
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    if (s.keys == 0) return Status{};
    return with_row_logs<T>(s, params.lse, parallel_for, [&](const RowLogs& logs) {
      const int64_t tasks = s.batch * s.heads * KeyBlocks(s.keys, kBlockKeys).blocks;
      return run_tasks<ReceivedWorker<T>>(ReceivedTasks{params, logs}, tasks, parallel_for);
    });
  });
}

Status head_divergence_fwd(const HeadDivergenceParams& params, ParallelFor parallel_for) {
  const AttentionScores& s = params.scores;
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    return with_row_logs<T>(s, params.lse, parallel_for, [&](const RowLogs& logs) {
      return run_tasks<DivergenceWorker<T>>(DivergenceTasks{params, logs}, s.batch, parallel_for);
    });
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

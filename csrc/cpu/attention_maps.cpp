// Statistics of the attention map that are no row sums: attention received per key, divergence of
// heads. Both recompute P = exp(S - lse) a few rows at a time and keep nothing N x N.
//
// in:       q, k by strides, features contiguous; lse [B, H, Nq]; bias, key mask
// out:      received [B, H, Nk] = mean over queries of P_ij; divergence [B, H, H] = mean over
//           queries of KL(P^h || P^g); fp32, every element written once
// numerics: fp32, totals of divergence over queries in fp64; sums over queries run in order
#include "attention_block.h"
#include "kernels.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int64_t kBlockKeys = 512;
constexpr int kStride = kBlockKeys + 16;
// Stands in for log 0 = -inf, so that 0 * log 0 = 0; a divergence that it enters with weight is
// infinite.
constexpr float kLogZero = -1e30f;
constexpr float kCertainlyInfinite = 1e15f;

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
  // lse of a row, 0 where no key is allowed.
  float shift(const float* lse, int64_t row) const {
    const float value = lse[(b_ * s_.heads + h_) * s_.queries + row];
    return value == -kInfinity ? 0.0f : value;
  }

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

// A task is one block of keys of one head, and owns its part of the output.
template <typename T>
class ReceivedWorker {
 public:
  explicit ReceivedWorker(const ReceivedAttentionParams& params)
      : p_(params), rows_(params.scores) {}

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
    const RowTiles tiles(s.queries);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t row = tiles.first(tile);
      const int64_t rows = tiles.first(tile + 1) - row;
      rows_.compute(row, rows, scores_);
      // The tile's rows are summed first: rounding errors grow more slowly.
      for (int64_t j = 0; j < columns; j += kLanes) {
        Floats sum = {};
        for (int64_t i = 0; i < rows; ++i) {
          sum += exp_lanes(load_floats(scores_ + i * kStride + j) -
                           splat(rows_.shift(p_.lse, row + i)));
        }
        store_floats(sums_ + j, load_floats(sums_ + j) + sum);
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
  }

  const ReceivedAttentionParams& p_;
  ScoreRows<T> rows_;
  Arena arena_;
  float* scores_ = nullptr;
  float* sums_ = nullptr;
};

// sums[h, g] += sum over columns of p[h, :] * logs[g, :], all heads against all heads, in tiles of
// kSide x kSide heads. Rows are `stride` apart.
constexpr int kSide = 3;

template <int kRows, int kColumns>
MIMKERNELS_INLINE void cross_tile(const float* p, const float* logs, int64_t stride,
                                  int64_t columns, float* sums, int64_t sums_stride) {
  Floats acc[kRows][kColumns];
  clear(acc);
  for (int64_t j = 0; j < columns; j += kLanes) {
    Floats right[kColumns];
    MIMKERNELS_UNROLL
    for (int g = 0; g < kColumns; ++g) right[g] = load_floats(logs + g * stride + j);
    MIMKERNELS_UNROLL
    for (int h = 0; h < kRows; ++h) {
      const Floats left = load_floats(p + h * stride + j);
      MIMKERNELS_UNROLL
      for (int g = 0; g < kColumns; ++g) acc[h][g] = mul_add(left, right[g], acc[h][g]);
    }
  }
  for (int h = 0; h < kRows; ++h) {
    for (int g = 0; g < kColumns; ++g) sums[h * sums_stride + g] += add_lanes(acc[h][g]);
  }
}

void cross_heads(const float* p, const float* logs, int64_t stride, int64_t columns, int64_t heads,
                 float* sums) {
  int64_t h = 0;
  for (; h + kSide <= heads; h += kSide) {
    int64_t g = 0;
    for (; g + kSide <= heads; g += kSide) {
      cross_tile<kSide, kSide>(p + h * stride, logs + g * stride, stride, columns,
                               sums + h * heads + g, heads);
    }
    for (; g < heads; ++g) {
      cross_tile<kSide, 1>(p + h * stride, logs + g * stride, stride, columns, sums + h * heads + g,
                           heads);
    }
  }
  for (; h < heads; ++h) {
    for (int64_t g = 0; g < heads; ++g) {
      cross_tile<1, 1>(p + h * stride, logs + g * stride, stride, columns, sums + h * heads + g,
                       heads);
    }
  }
}

// A task is one image. Rows of all heads are visited together: their P and log P lie side by side.
template <typename T>
class DivergenceWorker {
 public:
  explicit DivergenceWorker(const HeadDivergenceParams& params)
      : p_(params), rows_(params.scores) {}

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
      const float value = static_cast<float>(totals_[i] / static_cast<double>(s.queries));
      out[i] = value > kCertainlyInfinite ? kInfinity : value;
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
    for (int64_t h = 0; h < s.heads; ++h) {
      rows_.set_block(b, h, block);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tiles.first(tile);
        const int64_t count = tiles.first(tile + 1) - row;
        float* p = weights_ + h * head_stride + (row - top) * kStride;
        float* logs = logs_ + h * head_stride + (row - top) * kStride;
        rows_.compute(row, count, p);
        for (int64_t i = 0; i < count; ++i) {
          const Floats shift = splat(rows_.shift(p_.lse, row + i));
          for (int64_t j = 0; j < rows_.columns(); j += kLanes) {
            const Floats x = load_floats(p + i * kStride + j) - shift;
            store_floats(logs + i * kStride + j, max_or_second(splat(kLogZero), x));
            store_floats(p + i * kStride + j, exp_lanes(x));
          }
        }
      }
    }
    const int64_t cells = s.heads * s.heads;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < cells; ++c) sums_[c] = 0.0f;
      cross_heads(weights_ + i * kStride, logs_ + i * kStride, head_stride, rows_.columns(),
                  s.heads, sums_);
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
  ScoreRows<T> rows_;
  Arena arena_;
  float* weights_ = nullptr;
  float* logs_ = nullptr;
  float* sums_ = nullptr;
  double* totals_ = nullptr;
};

}  // namespace

Status received_attention_fwd(const ReceivedAttentionParams& params, ParallelFor parallel_for) {
  const AttentionScores& s = params.scores;
  return with_float_type(s.dtype, [&](auto type) {
    if (s.keys == 0) return Status{};
    const int64_t tasks = s.batch * s.heads * KeyBlocks(s.keys, kBlockKeys).blocks;
    return run_tasks<ReceivedWorker<decltype(type)>>(params, tasks, parallel_for);
  });
}

Status head_divergence_fwd(const HeadDivergenceParams& params, ParallelFor parallel_for) {
  return with_float_type(params.scores.dtype, [&](auto type) {
    return run_tasks<DivergenceWorker<decltype(type)>>(params, params.scores.batch, parallel_for);
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

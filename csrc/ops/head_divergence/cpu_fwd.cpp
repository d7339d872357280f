// head_divergence: how the heads of an image differ in what they attend to, without the N x N
// matrix.
//
// in:       q, k by strides, features contiguous; lse [B, H, Nq]; biases, key mask
// out:      [B, H, H] = mean over queries of KL(P^h || P^g) over the keys that both heads see; fp32,
//           every element written once
// numerics: fp32, totals over queries in fp64; sums run in order
// cost:     one pass over the scores, and another over those of rows whose lse is large
#include "cpu/attention/maps.h"
#include "cpu/kernels.h"
#include "ops/head_divergence/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr float kLowest = -3.40282347e38f;  // stands in for log 0 = -inf, so that 0 * log 0 = 0

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
    const int64_t head_stride = kSpanRows * kMapStride;
    // Only a bias can hide a key from one head and not from another.
    const bool hides = s.bias.given || s.table.given;
    const Floats least = splat(hides ? -kInfinity : kLowest);
    for (int64_t h = 0; h < s.heads; ++h) {
      rows_.set_block(b, h, block);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tiles.first(tile);
        const int64_t count = tiles.first(tile + 1) - row;
        float* p = weights_ + h * head_stride + (row - top) * kMapStride;
        float* logs = logs_ + h * head_stride + (row - top) * kMapStride;
        rows_.compute(row, count, p);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t j = 0; j < rows_.columns(); j += kLanes) {
            const Floats x =
                log_p(load_floats(p + i * kMapStride + j), row_logs_, rows_.at(row + i));
            store_floats(logs + i * kMapStride + j, max_or_second(least, x));
            store_floats(p + i * kMapStride + j, exp_lanes(x));
          }
        }
      }
    }
    const int64_t cells = s.heads * s.heads;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < cells; ++c) sums_[c] = 0.0f;
      const auto cross = hides ? cross_heads<true> : cross_heads<false>;
      cross(weights_ + i * kMapStride, logs_ + i * kMapStride, head_stride, rows_.columns(),
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
    weights_ = arena_.floats(s.heads * kSpanRows * kMapStride);
    logs_ = arena_.floats(s.heads * kSpanRows * kMapStride);
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

}  // namespace

Status head_divergence_fwd(const HeadDivergenceParams& params, ParallelFor parallel_for) {
  const AttentionScores& s = params.scores;
  const Status status = check_table(s);
  if (!status.ok()) return status;
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    return with_factors<T>(params, parallel_for, [&](const HeadDivergenceParams& p) {
      return with_row_logs<T>(p.scores, p.lse, parallel_for, [&](const RowLogs& logs) {
        return run_tasks<DivergenceWorker<T>>(DivergenceTasks{p, logs}, s.batch, parallel_for);
      });
    });
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

// The sums of P dP of all rows, as exact as fp32 sums are.
//
// They are also dout . out, but out is rounded: by as much, all of a row's dS are off together. That
// is less than their own rounding, unless many of a row are summed, as a table of relative positions
// sums those of [cls], or meet large factors, as those of cosines do.
#pragma once

#include "cpu/attention/maps.h"
#include "ops/attention/params.h"

namespace mimkernels::MIMKERNELS_ISA {

struct DeltaParams {
  const AttentionScores& scores;
  const AttentionScores& products;  // dP = dout v^T, as scores
  RowLogs logs;
  float* delta;  // [B, H, Nq]
};

// A task is one head.
template <typename T>
class DeltaWorker {
 public:
  explicit DeltaWorker(const DeltaParams& params)
      : p_(params), scores_(params.scores), products_(params.products) {}

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  void run(int64_t head) {
    const AttentionScores& s = p_.scores;
    const RowTiles tiles(s.queries);
    float* const delta = p_.delta + head * s.queries;
    for (int64_t i = 0; i < s.queries; ++i) delta[i] = 0.0f;
    for (int64_t block = 0; block < scores_.blocks().blocks; ++block) {
      scores_.set_block(head / s.heads, head % s.heads, block);
      products_.set_block(head / s.heads, head % s.heads, block);
      for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const int64_t row = tiles.first(tile);
        const int64_t rows = tiles.first(tile + 1) - row;
        scores_.compute(row, rows, s_rows_);
        products_.compute(row, rows, dp_rows_);
        for (int64_t i = 0; i < rows; ++i) delta[row + i] += sum_row(row + i, i * kMapStride);
      }
    }
  }

 private:
  // The padding of dP is -inf.
  float sum_row(int64_t row, int64_t at) const {
    Floats sum = {};
    for (int64_t j = 0; j < scores_.columns(); j += kLanes) {
      const Floats p = exp_lanes(log_p(load_floats(s_rows_ + at + j), p_.logs, scores_.at(row)));
      const Floats dp = load_floats(dp_rows_ + at + j);
      sum += choose_lanes((Ints)(p == 0.0f), (Floats){}, p * dp);
    }
    return add_lanes(sum);
  }

  void allocate() {
    scores_.allocate(arena_);
    products_.allocate(arena_);
    s_rows_ = arena_.floats(kRowTile * kMapStride);
    dp_rows_ = arena_.floats(kRowTile * kMapStride);
  }

  const DeltaParams& p_;
  ScoreRows<T> scores_;
  ScoreRows<T> products_;
  Arena arena_;
  float* s_rows_ = nullptr;
  float* dp_rows_ = nullptr;
};

// delta [B, H, Nq] of the backward.
template <typename T>
MIMKERNELS_INLINE Status sum_delta(const AttentionBwdParams& p, float* delta,
                                   ParallelFor parallel_for) {
  AttentionScores products = p.scores;
  products.scale = 1.0f;
  products.q = p.dout;
  products.k = p.v;
  products.bias = ScoreBias{};
  products.table = ScoreTable{};
  products.cosine = ScoreCosine{};
  products.key_mask = BoolMask{};
  const DeltaParams params{p.scores, products, RowLogs{p.lse, p.lse_low}, delta};
  return run_tasks<DeltaWorker<T>>(params, p.scores.batch * p.scores.heads, parallel_for);
}

}  // namespace mimkernels::MIMKERNELS_ISA

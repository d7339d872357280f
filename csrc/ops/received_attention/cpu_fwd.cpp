// received_attention: the attention that every key receives, without the N x N matrix.
//
// in:       q, k by strides, features contiguous; lse [B, H, Nq]; biases, key mask
// out:      [B, H, Nk] = mean over queries of P_ij; fp32, every element written once
// numerics: fp32, sums over queries compensated and in order
// cost:     one pass over the scores, and another over those of rows whose lse is large
#include "cpu/attention/maps.h"
#include "cpu/kernels.h"
#include "ops/received_attention/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

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
              exp_lanes(log_p(load_floats(scores_ + i * kMapStride + j), logs_, rows_.at(row + i)));
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
    scores_ = arena_.floats(kRowTile * kMapStride);
    sums_ = arena_.floats(kMapStride);
    excess_ = arena_.floats(kMapStride);
  }

  const ReceivedAttentionParams& p_;
  RowLogs logs_;
  ScoreRows<T> rows_;
  Arena arena_;
  float* scores_ = nullptr;
  float* sums_ = nullptr;
  float* excess_ = nullptr;  // of sums_ over the exact ones
};

}  // namespace

Status received_attention_fwd(const ReceivedAttentionParams& params, ParallelFor parallel_for) {
  const AttentionScores& s = params.scores;
  const Status status = check_table(s);
  if (!status.ok()) return status;
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    if (s.keys == 0) return Status{};
    return with_factors<T>(params, parallel_for, [&](const ReceivedAttentionParams& p) {
      return with_row_logs<T>(p.scores, p.lse, parallel_for, [&](const RowLogs& logs) {
        const int64_t tasks = s.batch * s.heads * KeyBlocks(s.keys, kMapKeys).blocks;
        return run_tasks<ReceivedWorker<T>>(ReceivedTasks{p, logs}, tasks, parallel_for);
      });
    });
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

// The bias that a table [T, H] and its index [Nq, Nk] make, and the gradient of the table: neither
// [H, Nq, Nk] nor its gradient is ever in memory.
#pragma once

#include "core/attention.h"
#include "cpu/attention/arena.h"
#include "cpu/attention/tile.h"

namespace mimkernels::MIMKERNELS_ISA {

// Up to so many numbers of [Nq, Nk], a thread keeps those of one head.
constexpr int64_t kKeptScores = int64_t{1} << 19;

// The order in which tasks visit heads: images in the outer loop, whose heads lie side by side in
// memory, or heads in the outer loop, whose images share a bias that is made from a table.
struct HeadOrder {
  int64_t batch = 0;
  int64_t heads = 0;
  bool images_share = false;

  explicit HeadOrder(const AttentionScores& s)
      : batch(s.batch), heads(s.heads), images_share(s.table.given) {}
  int64_t count() const { return batch * heads; }
  int64_t image(int64_t at) const { return images_share ? at % batch : at / heads; }
  int64_t head(int64_t at) const { return images_share ? at / batch : at % heads; }
};

MIMKERNELS_INLINE Status check_table(const AttentionScores& s) {
  if (!s.table.given) return Status{};
  return check_ids(s.table.index, 1, s.queries, s.keys, s.table.entries);
}

// Rows of table[index] of one head in fp32. Short ones are kept as long as the head stays the same.
class TableRows {
 public:
  explicit TableRows(const AttentionScores& s)
      : table_(s.table),
        keys_(s.keys),
        stride_(padded_columns(s.keys)),
        rows_(s.table.given && s.queries * stride_ <= kKeptScores ? s.queries : 0) {}

  bool given() const { return table_.given; }
  // Whether row() is there, else only fill().
  bool kept() const { return rows_ > 0; }
  int64_t stride() const { return stride_; }

  void allocate(Arena& arena) {
    column_ = arena.floats(table_.given ? table_.entries : 0);
    matrix_ = arena.floats(rows_ * stride_);
    made_ = arena.take<uint8_t>(rows_);
  }

  void set_head(int64_t h) {
    if (!table_.given || h == head_) return;
    head_ = h;
    (void)with_float_type(table_.dtype, [&](auto type) {
      const auto* src = static_cast<const decltype(type)*>(table_.data) + h;
      for (int64_t t = 0; t < table_.entries; ++t) {
        column_[t] = load_some<kLanes>(src + t * table_.stride_entry, 1).v[0][0];
      }
      return Status{};
    });
    memset(made_, 0, static_cast<size_t>(rows_));
  }

  // Row i, -inf on the padding.
  const float* row(int64_t i) {
    float* const dst = matrix_ + i * stride_;
    if (made_[i] == 0) {
      fill(i, 0, keys_, dst);
      for (int64_t j = keys_; j < stride_; ++j) dst[j] = -kInfinity;
      made_[i] = 1;
    }
    return dst;
  }

  // Keys [first, first + count) of row i.
  void fill(int64_t i, int64_t first, int64_t count, float* dst) const {
    const int64_t* const index = table_.index.data + i * table_.index.stride1 + first;
    for (int64_t j = 0; j < count; ++j) dst[j] = column_[index[j]];
  }

 private:
  ScoreTable table_;
  int64_t keys_;
  int64_t stride_;
  int64_t rows_;  // that are kept
  int64_t head_ = -1;
  float* column_ = nullptr;  // of the head
  float* matrix_ = nullptr;
  uint8_t* made_ = nullptr;
};

// Sums of dS by table entry, over some images and some rows of one head: first over the images,
// where that fits, then over the rows, in fp64.
class TableSums {
 public:
  TableSums(const AttentionScores& s, bool needed, int64_t most_rows)
      : table_(s.table),
        keys_(s.keys),
        stride_(padded_columns(s.keys)),
        entries_(needed ? s.table.entries : 0),
        rows_(needed && s.queries * stride_ <= kKeptScores ? most_rows : 0) {}

  void allocate(Arena& arena) {
    bins_ = arena.take<double>(entries_);
    matrix_ = arena.floats(rows_ * stride_);
  }

  // Before the first image of a head; its rows are [first, first + count).
  void open(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    for (int64_t t = 0; t < entries_; ++t) bins_[t] = 0.0;
    if (rows_ > 0) memset(matrix_, 0, static_cast<size_t>(count * stride_) * sizeof(float));
  }

  // dS of keys [first, first + count) of a row, whole registers of it.
  void add(int64_t row, int64_t first, int64_t count, const float* ds) {
    if (rows_ == 0) return scatter(row, first, count, ds);
    float* const dst = matrix_ + (row - first_) * stride_ + first;
    for (int64_t j = 0; j < count; j += kLanes) {
      store_floats(dst + j, load_floats(dst + j) + load_floats(ds + j));
    }
  }

  // After the last image: writes [T].
  void close(float* out) {
    for (int64_t i = 0; rows_ > 0 && i < count_; ++i) {
      scatter(first_ + i, 0, keys_, matrix_ + i * stride_);
    }
    for (int64_t t = 0; t < entries_; ++t) out[t] = static_cast<float>(bins_[t]);
  }

 private:
  void scatter(int64_t row, int64_t first, int64_t count, const float* ds) {
    const int64_t* const index = table_.index.data + row * table_.index.stride1 + first;
    for (int64_t j = 0; j < count; ++j) bins_[index[j]] += static_cast<double>(ds[j]);
  }

  ScoreTable table_;
  int64_t keys_;
  int64_t stride_;
  int64_t entries_;
  int64_t rows_;  // of the matrix
  int64_t first_ = 0;
  int64_t count_ = 0;
  double* bins_ = nullptr;
  float* matrix_ = nullptr;  // sums over the images
};

}  // namespace mimkernels::MIMKERNELS_ISA

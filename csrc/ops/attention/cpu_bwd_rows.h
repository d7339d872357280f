// What the gradients of attention share however their products are computed: which heads and rows
// a task has, the softmax's gradient of one row, the gradient of the bias.
#pragma once

#include "cpu/attention/cosine.h"
#include "cpu/attention/matrix_tiles.h"
#include "ops/attention/params.h"

namespace mimkernels::MIMKERNELS_ISA {

constexpr int64_t kBlockKeys = 320;

// ---- one row ----

// The six numbers of a row that lead from upstream gradients of lse and statistics to dS.
struct RowCoef {
  float c_prefix = 0.0f;
  float a_prefix = 0.0f;
  float c_patch = 0.0f;
  float a_patch = 0.0f;
  float own = 0.0f;
  float far = 0.0f;
};

// One row of scores and what its P and dS are computed from.
struct ScoreRow {
  float* s = nullptr;               // scores, or products that `scale` and `start` make scores
  float* dp = nullptr;              // dout v^T
  const float* start = nullptr;     // null where s holds scores
  float scale = 1.0f;               // of the products
  const float* distance = nullptr;  // to each key
  int64_t padded = 0;
  int64_t prefix = 0;  // keys of this block that are prefix tokens
  float lse = 0.0f;
  float lse_low = 0.0f;
  float centre = 0.0f;
};

// With x = dP - centre, replaces scores s by P and dP by x + c(j) + a(j) L + w d; returns the sum of
// P x.
template <bool kStart, bool kCoef, bool kFarther>
MIMKERNELS_INLINE float probability_row(const ScoreRow& row, const RowCoef& coef) {
  float* const s = row.s;
  float* const dp = row.dp;
  const Floats shift = splat(row.lse);
  const Floats low = splat(row.lse_low);
  const Floats centre = splat(row.centre);
  const Floats scale = splat(row.scale);
  using Exp = std::conditional_t<kMatrixTiles, ShortExp, PlainExp>;
  const Exp exp(1.0f);
  Floats sum = {};
  const auto step = [&](int64_t j, Floats c, Floats a) MIMKERNELS_LAMBDA_INLINE {
    Floats score = load_floats(s + j);
    if constexpr (kStart) score = mul_add(score, scale, load_floats(row.start + j));
    Floats log_p;  // in units of Exp::kUnit
    const Floats less = (score - shift) - low;
    const Floats p = exp(less, log_p);
    Floats t = load_floats(dp + j) - centre;
    sum = mul_add(p, t, sum);
    store_floats(s + j, p);
    if constexpr (kCoef) t += mul_add(a, log_p, c);
    if constexpr (kFarther) t = mul_add(splat(coef.far), load_floats(row.distance + j), t);
    store_floats(dp + j, t);
  };
  int64_t j = 0;
  if constexpr (kCoef) {
    for (; j < row.prefix; j += kLanes) {
      const Ints patch =
          (Ints)(lane_numbers(static_cast<int32_t>(j)) >= static_cast<int32_t>(row.prefix));
      step(
          j, choose_lanes(patch, splat(coef.c_patch), splat(coef.c_prefix)),
          choose_lanes(patch, splat(coef.a_patch * Exp::kUnit), splat(coef.a_prefix * Exp::kUnit)));
    }
  }
  const Floats c = splat(coef.c_patch);
  const Floats a = splat(coef.a_patch * Exp::kUnit);
  for (; j + kAtOnce * kLanes <= row.padded; j += kAtOnce * kLanes) {
    MIMKERNELS_UNROLL
    for (int i = 0; i < kAtOnce; ++i) step(j + i * kLanes, c, a);
  }
  if constexpr (kAtOnce > 1) {
    for (; j < row.padded; j += kLanes) step(j, c, a);
  }
  return add_lanes(sum);
}

// dS = P * (t - rest), in t's place.
MIMKERNELS_INLINE void gradient_row(const float* p, float* t, int64_t padded, float rest) {
  const Floats minus = splat(rest);
  for (int64_t j = 0; j < padded; j += kLanes) {
    store_floats(t + j, load_floats(p + j) * (load_floats(t + j) - minus));
  }
}

// dst (+)= src for one row of dbias.
template <typename T>
MIMKERNELS_INLINE void put_bias_row(T* dst, const float* src, int64_t count, bool add) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Floats value = load_floats(src + j);
    if (add) value += load_part<kLanes>(dst + j);
    store_part<kLanes>(dst + j, value);
  }
  if (j == count) return;
  Pack<kLanes> last;
  last.v[0] = load_floats(src + j);
  if (add) last.v[0] += load_some<kLanes>(dst + j, count - j).v[0];
  store_some<kLanes>(dst + j, last, count - j);
}

// ---- tasks ----

// Which heads share a row of dbias: those of one group, which are visited in order. Image b is in
// group b % group_batch.
struct HeadGroups {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t group_batch = 0;  // from 1 to batch
  int64_t group_heads = 0;  // 1 or heads

  int64_t count() const { return group_batch * group_heads; }
  bool shared() const { return group_batch < batch || group_heads < heads; }
  int64_t members(int64_t group) const {
    return ceil_div(batch - group / group_heads, group_batch) * (heads / group_heads);
  }
  int64_t image(int64_t group, int64_t member) const {
    return group / group_heads + member / (heads / group_heads) * group_batch;
  }
  int64_t head(int64_t group, int64_t member) const {
    return group_heads == 1 ? member % heads : group % group_heads;
  }
};

// What a pass over the heads computes, and where results go that a task does not finish alone.
struct Pass {
  bool grads = true;  // dq, dk, dv
  bool bias = false;
  bool table = false;  // groups are of one head then
  HeadGroups groups;
  int64_t chunks = 1;
  float* parts =
      nullptr;  // [2, chunks, B, H, Nk, D]: dk and dv of each chunk, if there are several
  float* bias_sums = nullptr;     // [groups, Nq, Nk] where dbias is 16-bit and sums over heads
  const float* delta = nullptr;   // [B, H, Nq] where out is too coarse for it
  float* table_parts = nullptr;   // [group_batch, chunks, H, T]
  double* scale_parts = nullptr;  // [chunks, B, H]: sums of q . dq before it is made a tangent
};

// What a thread of a pass keeps, but for its products: the head that it is at, that head's rows.
template <typename T>
class PassWorker {
 protected:
  // Whether P and dS are rounded for products of bf16.
  static constexpr bool kRoundsScores = std::is_same_v<T, bf16> && (kBf16Pairs || kMatrixTiles);

  // A chunk has at most most_rows rows.
  PassWorker(const AttentionBwdParams& params, const Pass& pass, int64_t most_rows,
             int64_t panel = kPanel)
      : p_(params),
        s_(params.scores),
        pass_(pass),
        blocks_(s_.keys, kBlockKeys, panel),
        distances_(params.positions, s_.keys, params.num_prefix, 1),
        most_rows_(most_rows),
        table_(s_, pass.table, most_rows) {}

  // `stride` floats hold a row of scores.
  void allocate_rows(int64_t stride) {
    mask_row_ = arena_.floats(blocks_.size + kPanel);
    bias_row_ = arena_.floats(kRoundsScores && ScoreStart::makes_rows(s_) ? stride + kPanel : 0);
    cosines_ = arena_.floats(sums_scale() ? 2 * stride : 0);
    centres_ = arena_.floats(blocks_.blocks > 1 ? most_rows_ : 0);
    start_.allocate(arena_);
    distances_.allocate(arena_);
    table_.allocate(arena_);
  }

  // Calls visit() at each head of a task, in order; it has rows [begin, end) of each.
  template <typename Visit>
  void visit_heads(int64_t task, int64_t begin, int64_t end, const Visit& visit) {
    group_ = task / pass_.chunks;
    chunk_ = task % pass_.chunks;
    const int64_t members = pass_.groups.members(group_);
    begin_ = begin;
    if (pass_.table) table_.open(begin, end - begin);
    for (int64_t member = 0; member < members; ++member) {
      b_ = pass_.groups.image(group_, member);
      h_ = pass_.groups.head(group_, member);
      opens_bias_ = member == 0;
      scale_sum_ = 0.0;
      distances_.set_image(b_);
      visit(member);
      if (pass_.scale_parts != nullptr) {
        pass_.scale_parts[(chunk_ * s_.batch + b_) * s_.heads + h_] = scale_sum_;
      }
    }
    if (pass_.table) {
      const int64_t part = group_ / s_.heads * pass_.chunks + chunk_;
      table_.close(pass_.table_parts + (part * s_.heads + h_) * s_.table.entries);
    }
    round_bias(begin, end);
  }

  // Whether dlogit_scale, which is fp32, is summed of dS row by row: q . dq is of dS as it was rounded.
  bool sums_scale() const { return kRoundsScores && pass_.scale_parts != nullptr; }

  // A row of products q . k is kept for it (`other`: beside another row) and made scores but for
  // their start.
  void start_cosines(int64_t row, bool other, int64_t count, float* s, int64_t stride) {
    if (sums_scale()) memcpy(cosines_ + other * stride, s, sizeof(float) * padded_columns(count));
    start_.apply_factors(row, 0, count, s);
  }

  // Of dS as dq takes it.
  void add_cosines(const float* ds, bool other, int64_t count, int64_t stride) {
    const float* const cosines = cosines_ + other * stride;
    Floats sum = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      const Ints there = (Ints)(lane_numbers(0) < static_cast<int32_t>(count - j));
      const Floats product = load_floats(ds + j) * load_floats(cosines + j);
      sum = sum + choose_lanes(there, product, (Floats){});
    }
    scale_sum_ += add_lanes(sum);
  }

  // What a query's products are added to: the mask, or biases and mask.
  const float* start_of(int64_t query, int64_t count) {
    if (!ScoreStart::makes_rows(s_)) return start_.mask_row(0);
    return start_.rows_of(query, 1, 0, count, bias_row_, 0).first;
  }

  // delta of a row, which is kept from block to block.
  float centre_of(int64_t row, int64_t index, int64_t block) {
    if (pass_.delta != nullptr) return pass_.delta[index];
    if (block > 0) return centres_[row - begin_];
    const float centre =
        dot_row(head_at<T>(p_.dout, b_, h_, row), head_at<T>(p_.out, b_, h_, row), s_.dim);
    if (blocks_.blocks > 1) centres_[row - begin_] = centre;
    return centre;
  }

  // P and t of one row of scores and dP, dS being P (t - rest) + P own at the row's own key.
  struct RowEnd {
    float rest = 0.0f;
    float own = 0.0f;
  };
  template <bool kStart>
  MIMKERNELS_INLINE RowEnd begin_row(int64_t row, int64_t block, float* s, float* ds,
                                     const float* start, float scale) {
    const int64_t first = blocks_.first(block);
    const int64_t count = blocks_.length(block);
    const int64_t index = (b_ * s_.heads + h_) * s_.queries + row;
    ScoreRow scores;
    scores.s = s;
    scores.dp = ds;
    scores.start = start;
    scores.scale = scale;
    scores.padded = padded_columns(count);
    scores.prefix = max_of(0, min_of(p_.num_prefix - first, count));
    scores.lse = p_.lse[index] == -kInfinity ? 0.0f : p_.lse[index];
    scores.lse_low = p_.lse_low[index];
    // P dP are summed about delta as out has it: rounding is relative to what is left, and that P
    // sums to 1 only nearly costs nothing.
    scores.centre = centre_of(row, index, block);
    RowEnd end;
    if (!p_.has_coef) {
      end.rest = probability_row<kStart, false, false>(scores, {});
    } else {
      const int64_t plane = s_.batch * s_.heads * s_.queries;
      const float* from = p_.coef + index;
      const RowCoef coef = {from[0],         from[plane],     from[2 * plane],
                            from[3 * plane], from[4 * plane], from[5 * plane]};
      if (!p_.positions.given) {
        end.rest = probability_row<kStart, true, false>(scores, coef);
      } else {
        scores.distance = distances_.row(row, 0, first, count);
        end.rest = probability_row<kStart, true, true>(scores, coef);
      }
      const int64_t own = row - first;
      if (own >= 0 && own < count) end.own = coef.own;
    }
    // With all keys at hand, the sum of P dP is free of out's rounding.
    if (blocks_.blocks > 1) end.rest = 0.0f;
    return end;
  }

  // dS in t's place, in dbias and dtable; with the factors of cosine attention, as dq and dk take
  // it.
  MIMKERNELS_INLINE void end_row(int64_t row, int64_t block, const float* s, float* ds,
                                 const RowEnd& end) {
    const int64_t first = blocks_.first(block);
    const int64_t count = blocks_.length(block);
    gradient_row(s, ds, padded_columns(count), end.rest);
    if (end.own != 0.0f) ds[row - first] += s[row - first] * end.own;
    if (pass_.bias) put_bias(row, first, count, ds);
    if (pass_.table) table_.add(row, first, count, ds);
    if (s_.cosine.given) start_.apply_factors(row, 0, count, ds);
  }

  // dq of a row of cosine attention.
  void write_query(int64_t row, const float* grad) {
    T* const out = gradient_at(p_.dq, s_.queries, row);
    const float along = write_tangent(out, grad, head_at<T>(s_.q, b_, h_, row), s_.dim);
    if (!kRoundsScores) scale_sum_ += along;
  }

  // The same of dk.
  void write_key(int64_t key, const float* grad) {
    T* const out = gradient_at(p_.dk, s_.keys, key);
    write_tangent(out, grad, head_at<T>(s_.k, b_, h_, key), s_.dim);
  }

  // Where a token's gradient goes.
  T* gradient_at(void* grad, int64_t tokens, int64_t token) const {
    return static_cast<T*>(grad) + (b_ * tokens + token) * p_.stride_grad + h_ * s_.dim;
  }

  // Where this chunk's share of a key's dk goes if there are several, and how far dv's is from it.
  float* part_at(int64_t key) const {
    const int64_t heads = s_.batch * s_.heads;
    return pass_.parts + ((chunk_ * heads + b_ * s_.heads + h_) * s_.keys + key) * s_.dim;
  }
  int64_t part_distance() const { return pass_.chunks * s_.batch * s_.heads * s_.keys * s_.dim; }

  const AttentionBwdParams& p_;
  const AttentionScores& s_;
  const Pass& pass_;
  KeyBlocks blocks_;
  Distances distances_;
  int64_t most_rows_;
  ScoreStart start_{s_};
  TableSums table_;
  Arena arena_;
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t group_ = 0;
  int64_t chunk_ = 0;
  bool opens_bias_ = true;
  double scale_sum_ = 0.0;
  float* mask_row_ = nullptr;
  float* bias_row_ = nullptr;

 private:
  // Rows of dbias that were summed over heads, rounded.
  void round_bias(int64_t begin, int64_t end) {
    if (!pass_.bias || pass_.bias_sums == nullptr) return;
    const int64_t at = (group_ * s_.queries + begin) * s_.keys;
    round_acc<false>(static_cast<T*>(p_.dbias) + at, pass_.bias_sums + at, (end - begin) * s_.keys);
  }

  void put_bias(int64_t row, int64_t first, int64_t count, const float* ds) {
    const int64_t at = (group_ * s_.queries + row) * s_.keys + first;
    if (pass_.bias_sums != nullptr) {
      put_bias_row(pass_.bias_sums + at, ds, count, !opens_bias_);
    } else if (s_.bias.dtype == DType::kFloat32) {
      put_bias_row(static_cast<float*>(p_.dbias) + at, ds, count, !opens_bias_);
    } else {
      put_bias_row(static_cast<T*>(p_.dbias) + at, ds, count, false);
    }
  }

  int64_t begin_ = 0;         // the first row of the task
  float* cosines_ = nullptr;  // q . k of a row or two
  float* centres_ = nullptr;
};

}  // namespace mimkernels::MIMKERNELS_ISA

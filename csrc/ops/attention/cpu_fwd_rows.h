// The softmax of scores that are there, and what is known of their rows: sums while keys are
// visited, lse and statistics once all have been.
#pragma once

#include "cpu/attention/block.h"
#include "ops/attention/params.h"

namespace mimkernels::MIMKERNELS_ISA {

constexpr int64_t kBlockKeys = 512;
constexpr int64_t kLeastRows = 64;  // of a head that are worth a task
constexpr int64_t kTasks = 64;      // wanted

// The head that a thread turns to next: its tokens are asked for, a few at a time, while another is
// computed.
template <typename T>
class NextHead {
 public:
  explicit NextHead(const AttentionScores& s) : s_(s) {}

  // What follows head `at`; none unless `ahead`.
  void set(const HeadOrder& order, int64_t at, bool ahead) {
    there_ = ahead && at + 1 < order.count();
    b_ = order.image(at + 1);
    h_ = order.head(at + 1);
  }

  void prefetch(const HeadRows& tokens, int64_t row, int64_t rows) const {
    if (!there_ || row + rows > s_.keys) return;
    prefetch_rows(head_at<T>(tokens, b_, h_, row), tokens.stride_token, rows, s_.dim);
  }

 private:
  const AttentionScores& s_;
  bool there_ = false;
  int64_t b_ = 0;
  int64_t h_ = 0;
};

// One number per row while its keys are visited, all relative to the maximum so far.
// kFirstTop is the key that has it.
enum RowField {
  kTop,
  kSum,
  kExpected,
  kPatchSum,
  kPatchExpected,
  kPrefixSum,
  kFar,
  kOwn,
  kFirstTop,
  kFields
};

struct RowSums {
  float sum = 0.0f;
  float expected = 0.0f;
  float patch_sum = 0.0f;
  float patch_expected = 0.0f;
  float far = 0.0f;
};

// Replaces the scores s of one row by p = exp(s - top), and leaves x = s - top if kExpect; with
// kShort, s is still to be multiplied by `scale`. Apart from the sums: chains of dependent
// instructions that wait for each other must be short. The weights of a product of bf16 are p,
// rounded; other products read s.
template <bool kExpect, bool kShort, typename E>
MIMKERNELS_INLINE void exp_row(float* s, float* x, E* weights, int64_t padded, float top,
                               float scale) {
  const Floats shift = splat(top);
  [[maybe_unused]] const Floats factor = splat(scale);
  for (int64_t j = 0; j < padded; j += kLanes) {
    Floats clamped;
    Floats less = load_floats(s + j);
    if constexpr (kShort) less *= factor;
    less -= shift;
    const Floats p = kShort ? exp_short(less, clamped) : exp_clamped(less, clamped);
    store_floats(s + j, p);
    if constexpr (kExpect) store_floats(x + j, clamped);
    if constexpr (kDepth<E> > 1) store_weights(weights + j, p);
  }
}

// The sums of some keys of one row: p, p x, both over the patch keys too, p * distance. The first
// `prefix` are prefix keys. The sum of p does not depend on where they end.
template <bool kExpect, bool kPatch, bool kFarther>
MIMKERNELS_INLINE RowSums sum_keys(const float* p, const float* x, const float* distance,
                                   int64_t padded, int64_t prefix) {
  Floats sum = {}, before = {}, patch_sum = {}, patch_expected = {}, far = {};
  int64_t j = 0;
  if constexpr (kExpect || kPatch) {
    // The registers that hold prefix keys, the last of them perhaps patch keys too.
    for (; j < prefix; j += kLanes) {
      const Floats p_j = load_floats(p + j);
      sum += p_j;
      const Ints is_patch =
          (Ints)(lane_numbers(static_cast<int32_t>(j)) >= static_cast<int32_t>(prefix));
      const Floats patch_p = choose_lanes(is_patch, p_j, (Floats){});
      if constexpr (kPatch) patch_sum += patch_p;
      if constexpr (kExpect) {
        before = mul_add(p_j - patch_p, load_floats(x + j), before);
        patch_expected = mul_add(patch_p, load_floats(x + j), patch_expected);
      }
      if constexpr (kFarther) far = mul_add(p_j, load_floats(distance + j), far);
    }
  }
  for (; j < padded; j += kLanes) {
    const Floats p_j = load_floats(p + j);
    sum += p_j;
    if constexpr (kPatch) patch_sum += p_j;
    if constexpr (kExpect) patch_expected = mul_add(p_j, load_floats(x + j), patch_expected);
    if constexpr (kFarther) far = mul_add(p_j, load_floats(distance + j), far);
  }
  RowSums out;
  out.sum = add_lanes(sum);
  if constexpr (kPatch) out.patch_sum = add_lanes(patch_sum);
  if constexpr (kExpect) out.patch_expected = add_lanes(patch_expected);
  if constexpr (kExpect) out.expected = out.patch_expected + add_lanes(before);
  if constexpr (kFarther) out.far = add_lanes(far);
  return out;
}

// Keys whose sums are taken at a time: a lane adds few numbers, so that rounding errors stay small.
constexpr int64_t kSumKeys = kLanes < 8 ? 64 : 256;

template <bool kExpect, bool kPatch, bool kFarther>
MIMKERNELS_INLINE RowSums sum_row(const float* p, const float* x, const float* distance,
                                  int64_t padded, int64_t prefix) {
  RowSums total;
  for (int64_t j = 0; j < padded; j += kSumKeys) {
    const int64_t keys = min_of(kSumKeys, padded - j);
    const RowSums sums = sum_keys<kExpect, kPatch, kFarther>(
        p + j, x + j, kFarther ? distance + j : nullptr, keys, max_of(0, min_of(prefix - j, keys)));
    total.sum += sums.sum;
    total.expected += sums.expected;
    total.patch_sum += sums.patch_sum;
    total.patch_expected += sums.patch_expected;
    total.far += sums.far;
  }
  return total;
}

MIMKERNELS_INLINE float sum_of_first(const float* p, int64_t count) {
  Floats lanes = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) lanes += load_floats(p + j);
  float sum = add_lanes(lanes);
  for (; j < count; ++j) sum += p[j];
  return sum;
}

// The first key whose score is `top`, the largest of `padded` ones; too large a number if none is.
MIMKERNELS_INLINE int64_t first_at_top(const float* s, int64_t padded, float top) {
  Ints first = (Ints){} + INT32_MAX;
  for (int64_t j = padded - kLanes; j >= 0; j -= kLanes) {
    const Ints is_top = (Ints)(load_floats(s + j) == splat(top));
    first = (is_top & lane_numbers(static_cast<int32_t>(j))) | (~is_top & first);
  }
  int64_t least = first[0];
  for (int i = 1; i < kLanes; ++i) least = min_of(least, first[i]);
  return least;
}

// Scores of a few rows and one block of keys; E is what P v reads.
template <typename E>
struct RowBlock {
  int64_t row = 0;                // of the head, the first
  int64_t rows = 0;               // at most kRowTile
  int64_t first = 0;              // key of the block
  int64_t count = 0;              // keys
  float* scores = nullptr;        // becomes p = exp(s - top)
  E* weights = nullptr;           // receives p, rounded, where P v reads bf16
  const float* maxima = nullptr;  // [rows, kLanes]
  float scale = 1.0f;             // positive; what exp_short still multiplies scores and maxima by
};

// Rows of scores lie kStride apart, those of weights kWeightStride. kShort: p is from exp_short.
template <typename E, int kStride, int kWeightStride, bool kShort>
class RowSoftmax {
 public:
  // For tasks of at most `task_rows` rows.
  RowSoftmax(const AttentionFwdParams& params, int64_t task_rows)
      : p_(params),
        s_(params.scores),
        row_stride_(padded_columns(task_rows)),
        distances_(params.positions, s_.keys, params.num_prefix, kRowTile) {}

  void allocate(Arena& arena) {
    shifted_ = arena.floats(kRowTile * kStride);
    state_ = arena.floats(kFields * row_stride_);
    distances_.allocate(arena);
  }

  // What follows are rows of a head, from first_row on.
  void set_task(int64_t b, int64_t h, int64_t first_row) {
    b_ = b;
    h_ = h;
    first_row_ = first_row;
    distances_.set_image(b);
  }

  // P of a block of keys. Sums of earlier blocks, and their P v, have to be multiplied by rescale.
  void visit(const RowBlock<E>& t, float* rescale) {
    const bool expect = asks(kEntropy | kPatchEntropy);
    const bool patch = asks(kPatchEntropy | kPatchMass);
    const bool far = asks(kDistance);
    if (far) {
      if (expect && patch) return visit_as<true, true, true>(t, rescale);
      if (expect) return visit_as<true, false, true>(t, rescale);
      if (patch) return visit_as<false, true, true>(t, rescale);
      return visit_as<false, false, true>(t, rescale);
    }
    if (expect && patch) return visit_as<true, true, false>(t, rescale);
    if (expect) return visit_as<true, false, false>(t, rescale);
    if (patch) return visit_as<false, true, false>(t, rescale);
    return visit_as<false, false, false>(t, rescale);
  }

  float sum(int64_t row) { return *state(kSum, row); }

  // lse and statistics of finished rows, many at a time.
  void finish(int64_t row, int64_t rows) {
    const int64_t plane = s_.batch * s_.heads * s_.queries;
    const int64_t at = (b_ * s_.heads + h_) * s_.queries + row;
    for (int64_t i = 0; i < rows; i += kLanes) {
      const int64_t n = min_of(kLanes, rows - i);
      const auto field = [&](int f) MIMKERNELS_LAMBDA_INLINE {
        return load_floats(state_ + f * row_stride_ + i);
      };
      const auto put = [&](float* dst, Floats value) MIMKERNELS_LAMBDA_INLINE {
        if (n == kLanes) return store_floats(dst + at + i, value);
        Pack<kLanes> some;
        some.v[0] = value;
        store_some<kLanes>(dst + at + i, some, n);
      };
      const Floats zero = {};
      const Floats top = field(kTop);
      const Floats sum = field(kSum);
      const Ints empty = (Ints)(sum == 0.0f);
      const Floats inverse = choose_lanes(empty, zero, 1.0f / sum);
      // Errors of lse and entropies are the same for all keys of a row: they do not average out in
      // its gradients.
      const Split log_sum = split_log(sum);
      const Split whole = exact_sum(top, log_sum.high);
      const Floats rest = whole.low + log_sum.low;
      const Floats infinite =
          choose_lanes((Ints)(top == splat(kInfinity)), top, top + log_sum.high);
      const Floats lse = choose_lanes((Ints)(top - top == zero), whole.high + rest, infinite);
      const Floats low = (whole.high - lse) + rest;
      put(p_.lse, lse);
      put(p_.lse_low, choose_lanes((Ints)(lse - lse == zero), low, zero));
      float* dst = p_.rows;
      const auto next = [&](Floats value) MIMKERNELS_LAMBDA_INLINE {
        put(dst, value);
        dst += plane;
      };
      if (asks(kEntropy)) {
        const Floats entropy = (log_sum.high - field(kExpected) * inverse) + log_sum.low;
        next(choose_lanes(empty, zero, entropy));
      }
      if (asks(kPrefixMass)) next(field(kPrefixSum) * inverse);
      if (asks(kSelfMass)) next(field(kOwn) * inverse);
      if (asks(kDistance)) next(field(kFar) * inverse);
      if (asks(kPatchEntropy)) {
        const Floats mass = field(kPatchSum);
        const Split log_mass = split_log(mass);
        const Floats entropy = (log_mass.high - field(kPatchExpected) / mass) + log_mass.low;
        const Ints few = (Ints)(mass * inverse < splat(kLeastPatchMass));
        next(choose_lanes(few, zero, entropy));
      }
      if (asks(kPeak)) next(inverse);
      if (asks(kPatchMass)) next(field(kPatchSum) * inverse);
      // The maximum passes NaN over, the sum does not; nor infinity.
      const Ints ordered = (Ints)(sum == sum) | (Ints)(top == splat(kInfinity));
      if (asks(kMaxScore)) next(choose_lanes(ordered, top, sum));
      if (asks(kArgmax)) next(choose_lanes(ordered & ~empty, field(kFirstTop), splat(-1.0f)));
    }
  }

 private:
  bool asks(int64_t stats) const { return (p_.stats & stats) != 0; }
  float* state(int field, int64_t row) { return state_ + field * row_stride_ + (row - first_row_); }

  template <bool kExpect, bool kPatch, bool kFarther>
  void visit_as(const RowBlock<E>& t, float* rescale) {
    const int64_t padded = padded_columns(t.count);
    const int64_t prefix = max_of(0, min_of(p_.num_prefix - t.first, t.count));
    const bool later = t.first > 0;
    float changes[kRowTile];
    for (int64_t i = 0; i < t.rows; ++i) {
      const float most = max_lanes(load_floats(t.maxima + i * kLanes));
      float top = kShort ? most * t.scale : most;
      float change = 0.0f;
      rescale[i] = 1.0f;
      if (asks(kArgmax) && (!later || top > *state(kTop, t.row + i))) {
        const int64_t key = t.first + first_at_top(t.scores + i * kStride, padded, most);
        *state(kFirstTop, t.row + i) = static_cast<float>(key);
      }
      if (later) {
        const float before = *state(kTop, t.row + i);
        top = before > top ? before : top;
        // Nothing was summed while the maximum was -inf. Clamped, so that 0 * change stays 0.
        change = before == top || before == -kInfinity ? 0.0f : before - top;
        change = change < -200.0f ? -200.0f : change;
        rescale[i] = exp_lanes(splat(change))[0];
      }
      *state(kTop, t.row + i) = top;
      changes[i] = change;
      exp_row<kExpect, kShort>(t.scores + i * kStride, shifted_ + i * kStride,
                               t.weights + i * kWeightStride, padded,
                               top == -kInfinity ? 0.0f : top, t.scale);
    }
    for (int64_t i = 0; i < t.rows; ++i) {
      const float* p = t.scores + i * kStride;
      const float* distance = nullptr;
      if constexpr (kFarther) distance = distances_.row(t.row + i, i, t.first, t.count);
      const RowSums sums =
          sum_row<kExpect, kPatch, kFarther>(p, shifted_ + i * kStride, distance, padded, prefix);
      const float change = changes[i];
      const float scale = rescale[i];
      // sum p (s - top) under a new top: every term scales, and shifts by change * p.
      const auto add = [&](int field, float value, int mass_field) {
        float& kept = *state(field, t.row + i);
        float old = 0.0f;
        if (later)
          old = scale * (mass_field < 0 ? kept : kept + change * *state(mass_field, t.row + i));
        kept = old + value;
      };
      if constexpr (kExpect) add(kExpected, sums.expected, kSum);
      if constexpr (kExpect && kPatch) add(kPatchExpected, sums.patch_expected, kPatchSum);
      add(kSum, sums.sum, -1);
      if constexpr (kPatch) add(kPatchSum, sums.patch_sum, -1);
      if constexpr (kFarther) add(kFar, sums.far, -1);
      if (asks(kPrefixMass)) add(kPrefixSum, sum_of_first(p, prefix), -1);
      if (asks(kSelfMass)) {
        const int64_t own = t.row + i - t.first;
        add(kOwn, own >= 0 && own < t.count ? p[own] : 0.0f, -1);
      }
    }
  }

  const AttentionFwdParams& p_;
  const AttentionScores& s_;
  int64_t row_stride_;
  Distances distances_;
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t first_row_ = 0;
  float* shifted_ = nullptr;  // scores less their row's maximum
  float* state_ = nullptr;
};

}  // namespace mimkernels::MIMKERNELS_ISA

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

// Lanes of the sums over keys of one row: of p; of p x over the prefix keys and over the others, the
// patch keys; of p over either; of p * distance.
struct RowLanes {
  Floats sum = {};
  Floats prefix_sum = {};
  Floats prefix_expected = {};
  Floats patch_sum = {};
  Floats patch_expected = {};
  Floats far = {};

  MIMKERNELS_INLINE void operator+=(const RowLanes& other) {
    sum += other.sum;
    prefix_sum += other.prefix_sum;
    prefix_expected += other.prefix_expected;
    patch_sum += other.patch_sum;
    patch_expected += other.patch_expected;
    far += other.far;
  }
};

// Keys whose sums are taken at a time: a lane adds few numbers, so that rounding errors stay small.
constexpr int64_t kSumKeys = kLanes < 8 ? 64 : 32 * kLanes;

// The weights p = exp(s - top) of scores s, which they may replace, and their sums, x being what `exp`
// says. The first `prefix` keys are prefix keys; the sum of p does not depend on how many.
template <bool kExpect, bool kPatch, bool kFarther, typename Exp, typename E>
MIMKERNELS_INLINE RowLanes weigh_keys(const float* s, E* weights, const float* distance,
                                      int64_t padded, int64_t prefix, Floats top, const Exp& exp) {
  RowLanes lanes;
  int64_t j = 0;
  // The registers that hold prefix keys, the last of them perhaps patch keys too.
  for (; j < prefix; j += kLanes) {
    Floats x;
    const Floats p = exp(load_floats(s + j) - top, x);
    store_weights(weights + j, p);
    lanes.sum += p;
    const Ints is_patch =
        (Ints)(lane_numbers(static_cast<int32_t>(j)) >= static_cast<int32_t>(prefix));
    const Floats patch_p = choose_lanes(is_patch, p, (Floats){});
    lanes.prefix_sum += p - patch_p;
    if constexpr (kPatch) lanes.patch_sum += patch_p;
    if constexpr (kExpect) {
      lanes.prefix_expected = mul_add(p - patch_p, x, lanes.prefix_expected);
      lanes.patch_expected = mul_add(patch_p, x, lanes.patch_expected);
    }
    if constexpr (kFarther) lanes.far = mul_add(p, load_floats(distance + j), lanes.far);
  }
  const auto visit = [&](auto count) MIMKERNELS_LAMBDA_INLINE {
    Floats p[count.value];
    MIMKERNELS_UNROLL
    for (int i = 0; i < count.value; ++i) {
      Floats x;
      p[i] = exp(load_floats(s + j + i * kLanes) - top, x);
      lanes.sum += p[i];
      if constexpr (kPatch) lanes.patch_sum += p[i];
      if constexpr (kExpect) lanes.patch_expected = mul_add(p[i], x, lanes.patch_expected);
      if constexpr (kFarther) {
        lanes.far = mul_add(p[i], load_floats(distance + j + i * kLanes), lanes.far);
      }
    }
    store_weights(weights + j, p);
    j += count.value * kLanes;
  };
  while (j + kAtOnce * kLanes <= padded) visit(Constant<kAtOnce>{});
  while (j < padded) visit(Constant<1>{});
  return lanes;
}

template <bool kExpect, bool kPatch, bool kFarther, typename Exp, typename E>
MIMKERNELS_INLINE RowLanes weigh_row(const float* s, E* weights, const float* distance,
                                     int64_t padded, int64_t prefix, Floats top, const Exp& exp) {
  if (kSumKeys >= kBlockKeys || padded <= kSumKeys) {
    return weigh_keys<kExpect, kPatch, kFarther>(s, weights, distance, padded, prefix, top, exp);
  }
  RowLanes total;
  for (int64_t j = 0; j < padded; j += kSumKeys) {
    const int64_t keys = min_of(kSumKeys, padded - j);
    const int64_t before = max_of(0, min_of(prefix - j, keys));
    const float* const far = kFarther ? distance + j : nullptr;
    total += weigh_keys<kExpect, kPatch, kFarther>(s + j, weights + j, far, keys, before, top, exp);
  }
  return total;
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
  int64_t row = 0;    // of the head, the first
  int64_t rows = 0;   // at most kRowTile
  int64_t first = 0;  // key of the block
  int64_t count = 0;  // keys
  const float* scores = nullptr;
  E* weights = nullptr;           // receives P; may be where the scores are
  const float* maxima = nullptr;  // [rows, kLanes]
};

// Rows of scores lie kStride apart, those of weights kWeightStride. kShort: p is from ShortExp.
template <typename E, int kStride, int kWeightStride, bool kShort>
class RowSoftmax {
 public:
  // For tasks of at most `task_rows` rows; scores and maxima are still to be multiplied by `scale`, 1
  // unless kShort.
  RowSoftmax(const AttentionFwdParams& params, int64_t task_rows, float scale = 1.0f)
      : p_(params),
        s_(params.scores),
        scale_(scale),
        row_stride_(padded_columns(task_rows)),
        distances_(params.positions, s_.keys, params.num_prefix, kRowTile) {}

  void allocate(Arena& arena) {
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
      const Floats top = field(kTop) * splat(scale_);
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
    using Exp = std::conditional_t<kShort, ShortExp, PlainExp>;
    const Exp exp(scale_);
    const int64_t padded = padded_columns(t.count);
    const int64_t prefix = max_of(0, min_of(p_.num_prefix - t.first, t.count));
    const bool later = t.first > 0;
    float own[kOwnRows];  // relative to the maximum
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t row = t.row + i;
      const float* const s = t.scores + i * kStride;
      const float most = max_lanes(load_floats(t.maxima + i * kLanes));
      float top = most;
      float change = 0.0f;
      rescale[i] = 1.0f;
      if (asks(kArgmax) && (!later || most > *state(kTop, row))) {
        *state(kFirstTop, row) = static_cast<float>(t.first + first_at_top(s, padded, most));
      }
      if (later) {
        const float before = *state(kTop, row);
        top = before > most ? before : most;
        // Nothing was summed while the maximum was -inf. Clamped, so that 0 * change stays 0.
        change = before == top || before == -kInfinity ? 0.0f : (before - top) * scale_;
        change = change < -200.0f ? -200.0f : change;
        rescale[i] = exp_lanes(splat(change))[0];
      }
      *state(kTop, row) = top;
      if (top == -kInfinity) top = 0.0f;
      if (asks(kSelfMass)) {
        const int64_t at = row - t.first;
        own[i] = at >= 0 && at < t.count ? s[at] - top : -kInfinity;
      }
      const float* distance = nullptr;
      if constexpr (kFarther) distance = distances_.row(row, i, t.first, t.count);
      const RowLanes lanes = weigh_row<kExpect, kPatch, kFarther>(
          s, t.weights + i * kWeightStride, distance, padded, prefix, splat(top), exp);
      float sums[4];
      if constexpr (kExpect || kPatch || kFarther) {
        add_lanes({lanes.patch_sum, lanes.patch_expected, lanes.prefix_expected, lanes.far}, sums);
      }
      // sum p (s - top) under a new top: every term scales, and shifts by change * p.
      const auto add = [&](int field, float value, int mass_field) MIMKERNELS_LAMBDA_INLINE {
        float& kept = *state(field, row);
        if (!later) {
          kept = value;
          return;
        }
        const float shift = mass_field < 0 ? 0.0f : change * *state(mass_field, row);
        kept = rescale[i] * (kept + shift) + value;
      };
      if constexpr (kExpect) {
        const float patch = sums[1] * Exp::kUnit;
        add(kExpected, patch + sums[2] * Exp::kUnit, kSum);
        if constexpr (kPatch) add(kPatchExpected, patch, kPatchSum);
      }
      add(kSum, add_lanes(lanes.sum), -1);
      if constexpr (kPatch) add(kPatchSum, sums[0], -1);
      if constexpr (kFarther) add(kFar, sums[3], -1);
      if (asks(kPrefixMass)) add(kPrefixSum, add_lanes(lanes.prefix_sum), -1);
    }
    if (asks(kSelfMass)) add_own(t, exp, own, rescale);
  }

  static constexpr int kOwnRows = (kRowTile + kLanes - 1) / kLanes * kLanes;

  // P of each row's own key, from its score less the maximum.
  template <typename Exp>
  void add_own(const RowBlock<E>& t, const Exp& exp, float (&own)[kOwnRows], const float* rescale) {
    for (int64_t i = t.rows; i < kOwnRows; ++i) own[i] = -kInfinity;
    for (int64_t i = 0; i < t.rows; i += kLanes) {
      Floats x;
      store_floats(own + i, exp(load_floats(own + i), x));
    }
    for (int64_t i = 0; i < t.rows; ++i) {
      float& kept = *state(kOwn, t.row + i);
      kept = t.first > 0 ? rescale[i] * kept + own[i] : own[i];
    }
  }

  const AttentionFwdParams& p_;
  const AttentionScores& s_;
  float scale_;
  int64_t row_stride_;
  Distances distances_;
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t first_row_ = 0;
  float* state_ = nullptr;
};

}  // namespace mimkernels::MIMKERNELS_ISA

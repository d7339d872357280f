// out = softmax(S) v, lse, and the row statistics asked for, S = scale * q k^T + bias.
//
// in:       q, k, v by strides, features contiguous, fp32, bf16 or fp16; bias, key mask, positions
// out:      out [B, Nq, H, D]; lse [B, H, Nq] and statistics in fp32; every element written once
// numerics: everything in fp32; scores and statistics are taken relative to the row's maximum, so
//           that entropies lose nothing to cancellation. Where bf16 has a dot product of its own, P
//           is rounded to bf16 for P v alone
// cost:     keys and values are packed once per block of 512 keys and stay in L2, the scores of a
//           few rows in L1; up to 512 keys a row's softmax is final at once, beyond that it is
//           rescaled from block to block
// order:    a row's sums depend on its keys alone: the same bits for any number of threads, and the
//           same out and lse whichever statistics are asked for
#include "cpu/attention/block.h"
#include "cpu/kernels.h"
#include "ops/attention/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int64_t kBlockKeys = 512;
constexpr int kStride = kBlockKeys + 16;  // between score rows; an odd number of cache lines
constexpr int64_t kLeastRows = 64;        // of a head that are worth a task
constexpr int64_t kTasks = 64;            // wanted

// One number per row while its keys are visited, all relative to the maximum so far.
enum RowField { kTop, kSum, kExpected, kPatchSum, kPatchExpected, kPrefixSum, kFar, kOwn, kFields };

struct RowSums {
  float sum = 0.0f;
  float expected = 0.0f;
  float patch_sum = 0.0f;
  float patch_expected = 0.0f;
  float far = 0.0f;
};

// Replaces the scores s of one row by p = exp(s - top), and leaves x = s - top if kExpect. Apart
// from the sums: chains of dependent instructions that wait for each other must be short.
template <bool kExpect, typename E>
MIMKERNELS_INLINE void exp_row(float* s, float* x, E* weights, int64_t padded, float top) {
  const Floats shift = splat(top);
  for (int64_t j = 0; j < padded; j += kLanes) {
    Floats clamped;
    const Floats p = exp_clamped(load_floats(s + j) - shift, clamped);
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

struct Visit {
  int64_t b = -1;
  int64_t h = -1;
  int64_t block = -1;
};

// What one thread works with.
template <typename T>
class Worker {
  using E = Operand<T>;
  // Rows of q are read where they lie, unless they must be converted.
  static constexpr bool kInPlace = std::is_same_v<E, T>;

 public:
  explicit Worker(const AttentionFwdParams& params)
      : p_(params),
        s_(params.scores),
        tiles_(s_.queries),
        blocks_(s_.keys, kBlockKeys),
        chunks_(row_chunks(s_.batch * s_.heads, s_.queries, kLeastRows, kTasks)),
        row_stride_(padded_columns(ceil_div(s_.queries, chunks_) + 2 * kRowTile)),
        distances_(params.positions, s_.keys, params.num_prefix, kRowTile) {}

  int64_t tasks() const { return s_.batch * s_.heads * chunks_; }

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  void run(int64_t task) {
    const int64_t head = task / chunks_;
    const int64_t chunk = task % chunks_;
    b_ = head / s_.heads;
    h_ = head % s_.heads;
    const int64_t next = head + 1;
    next_b_ = blocks_.blocks == 1 && chunk + 1 == chunks_ && next < s_.batch * s_.heads
                  ? next / s_.heads
                  : -1;
    next_h_ = next % s_.heads;
    distances_.set_image(b_);
    const int64_t begin = tiles_.tiles * chunk / chunks_;
    const int64_t end = tiles_.tiles * (chunk + 1) / chunks_;
    first_row_ = tiles_.first(begin);
    for (int64_t block = 0; block < blocks_.blocks; ++block) {
      pack(block);
      for (int64_t tile = begin; tile < end; ++tile) {
        visit_rows(tiles_.first(tile), tiles_.first(tile + 1) - tiles_.first(tile), block);
      }
    }
    finish(first_row_, tiles_.first(end) - first_row_);
  }

 private:
  void allocate() {
    const int64_t block = blocks_.size;
    keys_ = arena_.take<E>(block * s_.dim);
    values_ = arena_.take<E>(block * padded_columns(s_.dim));
    scores_ = arena_.floats(kRowTile * kStride);
    shifted_ = arena_.floats(kRowTile * kStride);
    weights_ = arena_.take<E>(kDepth<E> > 1 ? kRowTile * kStride : 0);
    query_ = arena_.take<E>(kInPlace ? 0 : kRowTile * kDimStride);
    result_ = arena_.floats((blocks_.blocks > 1 ? row_stride_ : kRowTile) * kDimStride);
    maxima_ = arena_.floats(kRowTile * kLanes);
    mask_row_ = arena_.floats(block + kPanel);
    state_ = arena_.floats(kFields * row_stride_);
    distances_.allocate(arena_);
  }

  bool asks(int64_t stats) const { return (p_.stats & stats) != 0; }
  float* state(int field, int64_t row) { return state_ + field * row_stride_ + (row - first_row_); }

  void pack(int64_t block) {
    start_.set_block(mask_row_, b_, h_, blocks_.first(block), blocks_.length(block));
    if (packed_.b == b_ && packed_.h == h_ && packed_.block == block) return;
    packed_ = {b_, h_, block};
    const int64_t first = blocks_.first(block);
    const int64_t count = blocks_.length(block);
    const uint8_t* allowed = mask_of(s_.key_mask, b_);
    pack_transposed(head_at<T>(s_.k, b_, h_, first), s_.k.stride_token, count, s_.dim,
                    allowed == nullptr ? nullptr : allowed + first, keys_);
    pack_rows(head_at<T>(p_.v, b_, h_, first), p_.v.stride_token, count, s_.dim, values_);
  }

  void visit_rows(int64_t row, int64_t rows, int64_t block) {
    const int64_t count = blocks_.length(block);
    ScoreTile<E> tile;
    if constexpr (kInPlace) {
      tile.rows = head_at<T>(s_.q, b_, h_, row);
      tile.row_stride = s_.q.stride_token;
    } else {
      copy_rows(head_at<T>(s_.q, b_, h_, row), s_.q.stride_token, rows, s_.dim, scale_.rows,
                query_);
      tile.rows = query_;
    }
    tile.panels = keys_;
    tile.dim = s_.dim;
    tile.run = score_run(s_);
    tile.keys = count;
    tile.scale = scale_.products;
    tile.scores = scores_;
    tile.maxima = maxima_;
    start_.template set_rows<kStride>(tile, row, rows);
    const int64_t out_stride = s_.heads * s_.dim;
    T* out = static_cast<T*>(p_.out) + ((b_ * s_.queries + row) * s_.heads + h_) * s_.dim;
    const bool last = block + 1 == blocks_.blocks;
    if (last) prefetch_rows(out, out_stride, rows, s_.dim);
    prefetch_next(s_.q, row, rows);
    prefetch_next(s_.k, row, rows);
    if (row + 2 * rows <= s_.queries) {
      prefetch_rows(head_at<T>(s_.q, b_, h_, row + rows), s_.q.stride_token, rows, s_.dim);
    }
    with_row_count(rows, [&](auto n) { score_rows<kStride, true, n.value>(tile); });

    float scale[kRowTile];
    softmax_rows(row, rows, block, scale);
    prefetch_next(p_.v, row, rows);
    float* result = result_ + (blocks_.blocks > 1 ? (row - first_row_) * kDimStride : 0);
    if (block > 0) {
      for (int64_t i = 0; i < rows; ++i) {
        write_row(result + i * kDimStride, result + i * kDimStride, padded_columns(s_.dim),
                  scale[i]);
      }
    }
    for (int64_t i = 0; last && i < rows; ++i) {
      const float sum = *state(kSum, row + i);
      scale[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
    const auto finish = [&](int r, int64_t c, Floats value) MIMKERNELS_LAMBDA_INLINE {
      if (last) {
        put_columns(out + r * out_stride + c, value * splat(scale[r]), s_.dim - c);
      } else {
        store_floats(result + r * kDimStride + c, value);
      }
    };
    with_row_count(rows, [&](auto n) {
      if (block > 0) {
        weigh_panels<kStride, true, n.value>(weights(), values_, count, s_.dim, result, finish);
      } else {
        weigh_panels<kStride, false, n.value>(weights(), values_, count, s_.dim, result, finish);
      }
    });
  }

  // P as P v reads it.
  E* weights() const {
    if constexpr (kDepth<E> > 1) {
      return weights_;
    } else {
      return scores_;
    }
  }

  // The next head's tokens, a few at a time while this head is computed.
  void prefetch_next(const HeadRows& tokens, int64_t row, int64_t rows) const {
    if (next_b_ < 0 || row + rows > s_.keys) return;
    prefetch_rows(head_at<T>(tokens, next_b_, next_h_, row), tokens.stride_token, rows, s_.dim);
  }

  void softmax_rows(int64_t row, int64_t rows, int64_t block, float* rescale) {
    const bool expect = asks(kEntropy | kPatchEntropy);
    const bool patch = asks(kPatchEntropy | kPatchMass);
    const bool far = asks(kDistance);
    if (far) {
      if (expect && patch) return softmax_rows_as<true, true, true>(row, rows, block, rescale);
      if (expect) return softmax_rows_as<true, false, true>(row, rows, block, rescale);
      if (patch) return softmax_rows_as<false, true, true>(row, rows, block, rescale);
      return softmax_rows_as<false, false, true>(row, rows, block, rescale);
    }
    if (expect && patch) return softmax_rows_as<true, true, false>(row, rows, block, rescale);
    if (expect) return softmax_rows_as<true, false, false>(row, rows, block, rescale);
    if (patch) return softmax_rows_as<false, true, false>(row, rows, block, rescale);
    return softmax_rows_as<false, false, false>(row, rows, block, rescale);
  }

  template <bool kExpect, bool kPatch, bool kFarther>
  void softmax_rows_as(int64_t row, int64_t rows, int64_t block, float* rescale) {
    const int64_t first = blocks_.first(block);
    const int64_t count = blocks_.length(block);
    const int64_t padded = padded_columns(count);
    const int64_t prefix = max_of(0, min_of(p_.num_prefix - first, count));
    float changes[kRowTile];
    for (int64_t i = 0; i < rows; ++i) {
      float top = max_lanes(load_floats(maxima_ + i * kLanes));
      float change = 0.0f;
      rescale[i] = 1.0f;
      if (block > 0) {
        const float before = *state(kTop, row + i);
        top = before > top ? before : top;
        // Nothing was summed while the maximum was -inf. Clamped, so that 0 * change stays 0.
        change = before == top || before == -kInfinity ? 0.0f : before - top;
        change = change < -200.0f ? -200.0f : change;
        rescale[i] = exp_lanes(splat(change))[0];
      }
      *state(kTop, row + i) = top;
      changes[i] = change;
      exp_row<kExpect>(scores_ + i * kStride, shifted_ + i * kStride, weights() + i * kStride,
                       padded, top == -kInfinity ? 0.0f : top);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* p = scores_ + i * kStride;
      const float* distance = nullptr;
      if constexpr (kFarther) distance = distances_.row(row + i, i, first, count);
      const RowSums sums =
          sum_row<kExpect, kPatch, kFarther>(p, shifted_ + i * kStride, distance, padded, prefix);
      const float change = changes[i];
      const float scale = rescale[i];
      // sum p (s - top) under a new top: every term scales, and shifts by change * p.
      const auto add = [&](int field, float value, int mass_field) {
        float& kept = *state(field, row + i);
        float old = 0.0f;
        if (block > 0)
          old = scale * (mass_field < 0 ? kept : kept + change * *state(mass_field, row + i));
        kept = old + value;
      };
      if constexpr (kExpect) add(kExpected, sums.expected, kSum);
      if constexpr (kExpect && kPatch) add(kPatchExpected, sums.patch_expected, kPatchSum);
      add(kSum, sums.sum, -1);
      if constexpr (kPatch) add(kPatchSum, sums.patch_sum, -1);
      if constexpr (kFarther) add(kFar, sums.far, -1);
      if (asks(kPrefixMass)) add(kPrefixSum, sum_of_first(p, prefix), -1);
      if (asks(kSelfMass)) {
        const int64_t own = row + i - first;
        add(kOwn, own >= 0 && own < count ? p[own] : 0.0f, -1);
      }
    }
  }

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
    }
  }

  const AttentionFwdParams& p_;
  const AttentionScores& s_;
  RowTiles tiles_;
  KeyBlocks blocks_;
  int64_t chunks_;
  int64_t row_stride_;
  SplitScale scale_{s_.scale, !kInPlace};
  Distances distances_;
  ScoreStart start_{s_};
  Arena arena_;
  Visit packed_;
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t next_b_ = -1;  // -1: none, or too long to be kept
  int64_t next_h_ = 0;
  int64_t first_row_ = 0;
  E* keys_ = nullptr;
  E* values_ = nullptr;
  float* scores_ = nullptr;
  float* shifted_ = nullptr;  // scores less their row's maximum
  E* weights_ = nullptr;
  E* query_ = nullptr;
  float* result_ = nullptr;
  float* maxima_ = nullptr;
  float* mask_row_ = nullptr;
  float* state_ = nullptr;
};

// No keys at all: zeros, and an lse of -inf.
template <typename T>
void write_empty(const AttentionFwdParams& p) {
  const AttentionScores& s = p.scores;
  const int64_t rows = s.batch * s.heads * s.queries;
  memset(p.out, 0, static_cast<size_t>(rows * s.dim) * sizeof(T));
  for (int64_t i = 0; i < rows; ++i) {
    p.lse[i] = -kInfinity;
    p.lse_low[i] = 0.0f;
  }
  const int64_t planes = __builtin_popcountll(static_cast<unsigned long long>(p.stats));
  if (planes > 0) memset(p.rows, 0, static_cast<size_t>(planes * rows) * sizeof(float));
}

}  // namespace

Status attention_fwd(const AttentionFwdParams& params, ParallelFor parallel_for) {
  const AttentionScores& s = params.scores;
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    if (s.batch * s.heads * s.queries == 0) return Status{};
    if (s.keys == 0) {
      write_empty<T>(params);
      return Status{};
    }
    const int64_t tasks = Worker<T>(params).tasks();
    int failures = 0;
    run_parallel(parallel_for, tasks, 1, [&](int64_t begin, int64_t end) {
      Worker<T> worker(params);
      if (!worker.reserve()) {
        __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t task = begin; task < end; ++task) worker.run(task);
    });
    return failures != 0 ? out_of_memory() : Status{};
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

// What both directions of reduce_pool share: how the work is split, and powers.
#pragma once

#include "pool.h"

namespace mimkernels::MIMKERNELS_ISA {

// Columns of one task. Few images are cut finer, so that every thread has some.
constexpr int64_t kReduceTile = 1024;
constexpr int64_t kNarrowTile = 128;

struct ReduceTasks {
  explicit ReduceTasks(const ReducePoolParams& p)
      : dim(p.dim),
        tile(p.batch >= kLeastTasks ? kReduceTile : kNarrowTile),
        tiles(ceil_div(p.dim, tile)),
        count(p.batch * tiles) {}
  int64_t image(int64_t task) const { return task / tiles; }
  int64_t first(int64_t task) const { return task % tiles * tile; }
  int64_t columns(int64_t task) const { return min_of(tile, dim - first(task)); }

  int64_t dim;
  int64_t tile;
  int64_t tiles;
  int64_t count;
};

MIMKERNELS_INLINE int64_t count_allowed(const ReducePoolParams& p, int64_t b) {
  int64_t count = 0;
  for (int64_t n = p.num_prefix; n < p.tokens; ++n) {
    count += is_allowed(p.mask, p.num_prefix, b, n);
  }
  return count;
}

// Tokens that are summed one after the other; then their sums join the total, so that rounding
// errors do not grow with the length of the sequence.
constexpr int64_t kSumRun = 128;

MIMKERNELS_INLINE void close_run(float* total, float* run, int64_t dim) {
  for (int64_t c = 0; c < dim; c += 16) {
    store<16>(total + c, load<16>(total + c) + load<16>(run + c));
    store<16>(run + c, broadcast<16>(0.0f));
  }
}

// exp(x) for any x; infinity beyond the largest float.
template <int N>
MIMKERNELS_INLINE Pack<N> exp_of(Pack<N> x) {
  static_assert(Pack<N>::kWidth == kLanes);
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    // exp_lanes reaches to 88; the largest float is exp(88.72).
    const Floats least = choose_lanes((Ints)(x.v[p] > splat(89.0f)), splat(89.0f), x.v[p]);
    const Ints large = (Ints)(least > splat(88.0f));
    const Floats power = exp_lanes(choose_lanes(large, least - 1.0f, least));
    x.v[p] = choose_lanes(large, power * 2.71828183f, power);
  }
  return x;
}

template <int N>
MIMKERNELS_INLINE Pack<N> log_of(Pack<N> x) {
  static_assert(Pack<N>::kWidth == kLanes);
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) x.v[p] = log_lanes(x.v[p]);
  return x;
}

// max(x, eps), NaN for NaN.
template <int N>
MIMKERNELS_INLINE Pack<N> at_least(const Pack<N>& x, const Pack<N>& eps) {
  return where_less(x, eps, eps, x);
}

}  // namespace mimkernels::MIMKERNELS_ISA

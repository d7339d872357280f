// What both directions of reduce_pool share: how the work is split, and powers.
#pragma once

#include "cpu/pooling/pool.h"
#include "ops/reduce_pool/params.h"

namespace mimkernels::MIMKERNELS_ISA {

// Columns of one task. Few images are split finer, so that every thread has some.
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

// The same exponent p for many numbers. high has so few bits that its products with the exponents
// of floats are exact, and low is the rest.
struct Power {
  explicit Power(float exponent) : p(exponent) {
    uint32_t bits;
    memcpy(&bits, &exponent, sizeof(bits));
    bits &= 0xfffff000u;
    memcpy(&high, &bits, sizeof(high));
    low = exponent - high;
  }
  float p;
  float high;
  float low = 0.0f;
};

// 2^n for whole n in [-126, 127].
MIMKERNELS_INLINE Floats power_of_two(Floats n) {
  return (Floats)((Words)(__builtin_convertvector(n, Ints) + 127) << 23);
}

// x^p for x > 0, infinity and NaN included, x^0 = 1 even of these: a few units in the last place
// off however large p log x is, where exp(p log x) loses as many bits as that has.
MIMKERNELS_INLINE Floats pow_lanes(Floats x, const Power& power) {
  const LogParts parts = log_parts(x);
  const Floats log2_m = (parts.f - parts.curve) * 1.44269504f;
  const Floats high = parts.e * power.high;
  const Floats rest = parts.e * power.low + log2_m * power.p;
  // Beyond 2^+-200 all is infinity or 0. Adding 1.5 * 2^23 rounds to a whole number.
  Floats n = high + rest;
  n = choose_lanes((Ints)(n > splat(200.0f)), splat(200.0f), n);
  n = choose_lanes((Ints)(n < splat(-200.0f)), splat(-200.0f), n);
  n = (n + 12582912.0f) - 12582912.0f;
  Floats r = (high - n) + rest;
  r = choose_lanes((Ints)(r > splat(1.0f)), splat(1.0f), r);
  r = choose_lanes((Ints)(r < splat(-1.0f)), splat(-1.0f), r);
  // In two steps, so that the powers of two are floats.
  const Floats half = (n * 0.5f + 12582912.0f) - 12582912.0f;
  const Floats out = exp_lanes(r * 0.693147181f) * power_of_two(half) * power_of_two(n - half);
  const Floats at_infinity = splat(power.p > 0.0f ? kInfinity : power.p < 0.0f ? 0.0f : 1.0f);
  const Floats at_nan = power.p == 0.0f ? splat(1.0f) : x;
  return choose_lanes((Ints)(x < splat(kInfinity)), out,
                      choose_lanes((Ints)(x == splat(kInfinity)), at_infinity, at_nan));
}

template <int N>
MIMKERNELS_INLINE Pack<N> pow_of(Pack<N> x, const Power& power) {
  static_assert(Pack<N>::kWidth == kLanes);
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) x.v[p] = pow_lanes(x.v[p], power);
  return x;
}

constexpr float kLeastFloat = 1.40129846e-45f;

// `value` where x is positive or NaN, `other` where it is 0.
template <int N>
MIMKERNELS_INLINE Pack<N> unless_zero(const Pack<N>& x, const Pack<N>& value,
                                      const Pack<N>& other) {
  return where_less(x, broadcast<N>(kLeastFloat), other, value);
}

// x^(1/p) of a mean of powers, which is 0 where all of these are below what a float holds.
template <int N>
MIMKERNELS_INLINE Pack<N> root_of(const Pack<N>& x, const Power& root) {
  return unless_zero(x, pow_of(x, root), broadcast<N>(0.0f));
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

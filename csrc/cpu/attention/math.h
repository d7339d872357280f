// One register of floats: fused multiply-add, reductions, transposes, exp and log, for the
// attention kernels. They fuse multiplications and additions where the instruction set can, so that
// their results differ between instruction sets in the last bits (and not between runs or thread
// counts).
#pragma once

#include <cmath>

#include "cpu/vec.h"

namespace mimkernels::MIMKERNELS_ISA {

using Floats = VecTypes<kLanes>::F;
using Ints = VecTypes<kLanes>::I;
using Words = VecTypes<kLanes>::U;

constexpr float kInfinity = __builtin_inff();

MIMKERNELS_INLINE Floats splat(float value) { return value - (Floats){}; }
MIMKERNELS_INLINE Floats load_floats(const float* src) { return load_part<kLanes>(src); }
MIMKERNELS_INLINE void store_floats(float* dst, Floats value) { store_part<kLanes>(dst, value); }

#if defined(__AVX512F__) || defined(__FMA__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;  // a product is rounded before it is added
#endif

// a * b + c
MIMKERNELS_INLINE Floats mul_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The larger; b where either is NaN.
MIMKERNELS_INLINE Floats max_or_second(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller; b where either is NaN.
MIMKERNELS_INLINE Floats min_or_second(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// Of x >= 0, finite.
MIMKERNELS_INLINE Floats root(Floats x) {
#if defined(__AVX512F__)
  // An estimate of 14 bits and a step of Newton's, 1 unit in the last place off: the instruction for
  // roots keeps its unit busy for 12 cycles.
  const __m512 some = (__m512)max_or_second(splat(1.17549435e-38f), x);
  const Floats inverse = (Floats)_mm512_maskz_rsqrt14_ps(0xffff, some);
  const Floats near = x * inverse;
  const Floats error =
      (Floats)_mm512_fnmadd_ps((__m512)near, (__m512)(inverse * 0.5f), (__m512)splat(0.5f));
  return mul_add(near, error, near);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Floats)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// yes where the mask is set (all ones), else no.
MIMKERNELS_INLINE Floats choose_lanes(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }

// 0, 1, 2, ... plus first.
MIMKERNELS_INLINE Ints lane_numbers(int32_t first) {
  Ints out;
  MIMKERNELS_UNROLL
  for (int i = 0; i < kLanes; ++i) out[i] = i;  // a constant
  return out + first;
}

#if defined(__AVX2__)
MIMKERNELS_INLINE __m128 fold_add(Floats x) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1));
#else
  const __m256 half = (__m256)x;
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

MIMKERNELS_INLINE __m128 fold_max(Floats x) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_max_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1));
#else
  const __m256 half = (__m256)x;
#endif
  return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

MIMKERNELS_INLINE float add_lanes(Floats x) {
  __m128 v = fold_add(x);
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

MIMKERNELS_INLINE float max_lanes(Floats x) {
  __m128 v = fold_max(x);
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
#else
MIMKERNELS_INLINE float add_lanes(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }

MIMKERNELS_INLINE float max_lanes(Floats x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = best > x[i] ? best : x[i];
  return best;
}
#endif

// The sums of four registers at once; each does not depend on the other three.
MIMKERNELS_INLINE void add_lanes(const Floats (&x)[4], float* sums) {
#if defined(__AVX512F__)
  const auto both = [](Floats a, Floats b) MIMKERNELS_LAMBDA_INLINE {
    return (Floats)_mm512_maskz_unpacklo_epi32(0xffff, (__m512i)a, (__m512i)b) +
           (Floats)_mm512_maskz_unpackhi_epi32(0xffff, (__m512i)a, (__m512i)b);
  };
  const __m512i first = (__m512i)both(x[0], x[1]);
  const __m512i second = (__m512i)both(x[2], x[3]);
  const Floats all = (Floats)_mm512_maskz_unpacklo_epi64(0xff, first, second) +
                     (Floats)_mm512_maskz_unpackhi_epi64(0xff, first, second);
  _mm_storeu_ps(sums, fold_add(all));
#elif defined(__AVX2__)
  const auto both = [](Floats a, Floats b) MIMKERNELS_LAMBDA_INLINE {
    return _mm256_unpacklo_ps((__m256)a, (__m256)b) + _mm256_unpackhi_ps((__m256)a, (__m256)b);
  };
  const __m256d first = (__m256d)both(x[0], x[1]);
  const __m256d second = (__m256d)both(x[2], x[3]);
  const Floats all =
      (Floats)_mm256_unpacklo_pd(first, second) + (Floats)_mm256_unpackhi_pd(first, second);
  _mm_storeu_ps(sums, fold_add(all));
#else
  for (int i = 0; i < 4; ++i) sums[i] = add_lanes(x[i]);
#endif
}

// kSquare x kSquare floats, transposed in registers.
#if defined(__AVX2__)
constexpr int kSquare = 8;
#else
constexpr int kSquare = 4;
#endif
using SquareRow = VecTypes<kSquare>::F;

MIMKERNELS_INLINE void transpose_square(SquareRow (&rows)[kSquare]) {
#if defined(__AVX2__)
  __m256 pairs[8];
  MIMKERNELS_UNROLL
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  __m256 fours[8];
  MIMKERNELS_UNROLL
  for (int i = 0; i < 8; i += 4) {
    MIMKERNELS_UNROLL
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  MIMKERNELS_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = (SquareRow)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = (SquareRow)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
#else
  SquareRow out[kSquare];
  for (int i = 0; i < kSquare; ++i) {
    for (int j = 0; j < kSquare; ++j) out[i][j] = rows[j][i];
  }
  for (int i = 0; i < kSquare; ++i) rows[i] = out[i];
#endif
}

// Here the power of two in exp_clamped is 2^-127, whose bits are those of 0.
constexpr float kLeastExponent = -88.0f;

// exp(x), at most 1 unit in the last place off for x in [-87.3, 88]; 0 from -87.7 down (also for
// -inf), NaN for NaN. `clamped` becomes max(x, kLeastExponent), so that exp(x) * clamped is 0 for x
// = -inf.
MIMKERNELS_INLINE Floats exp_clamped(Floats x, Floats& clamped) {
  clamped = max_or_second(splat(kLeastExponent), x);
  // Adding 1.5 * 2^23 rounds to an integer n, which stays readable in the low bits of the sum.
  const Floats shifter = splat(12582912.0f);
  const Floats shifted = mul_add(clamped, splat(1.44269504f), shifter);
  const Floats n = shifted - shifter;
  // ln 2 in two parts; n times the first one is exact.
  Floats r = mul_add(n, splat(-0.693359375f), clamped);
  r = mul_add(n, splat(2.12194440e-4f), r);
  // Minimax on |r| <= ln(2) / 2, the first two coefficients kept at 1: relative error 3.2e-9.
  const Floats r2 = r * r;
  Floats high = mul_add(splat(0.00836884044f), r, splat(0.0416682437f));
  Floats low = mul_add(splat(0.166665196f), r, splat(0.49999994f));
  high = mul_add(splat(0.00138230005f), r2, high);
  low = mul_add(high, r2, low);
  const Floats y = mul_add(low, r2, r) + 1.0f;
  const Floats power = (Floats)(((Words)shifted << 23) + 0x3f800000u);
  return y * power;
}

// exp_clamped with the interface of ShortExp, for a scale of 1.
class PlainExp {
 public:
  static constexpr float kUnit = 1.0f;  // of x

  explicit PlainExp(float) {}
  MIMKERNELS_INLINE Floats operator()(Floats d, Floats& x) const { return exp_clamped(d, x); }
};

MIMKERNELS_INLINE Floats exp_lanes(Floats x) {
  Floats clamped;
  return exp_clamped(x, clamped);
}

// exp(scale * d) for products of bf16, in half of the instructions: relative error below
// 1.7e-7 + 1.3e-7 |scale * d|, so that next to exp(0) = 1, which is exact, no p is off by more than
// 1.7e-7. `scale` is positive.
class ShortExp {
 public:
  static constexpr float kUnit = 0.693147181f;  // of x

  // Where scale * log2(e) fits into fp32.
  static bool takes(float scale) { return scale > 0.0f && scale < 2e38f; }

  explicit ShortExp(float scale)
      : factor_(splat(scale * 1.44269504f)),
        least_(max_or_second(splat(-kLargest), -126.0f / factor_)) {}

  // 2^x, x being log2(e) * scale * d: exact where x is a whole number. Below 2^-126, and for d = -inf,
  // both it and x are 0; NaN for NaN.
  MIMKERNELS_INLINE Floats operator()(Floats d, Floats& x) const {
#if defined(__AVX512DQ__)
    const __mmask16 there = _mm512_cmp_ps_mask((__m512)d, (__m512)least_, _CMP_NLT_UQ);
    x = (Floats)_mm512_maskz_mul_ps(there, (__m512)d, (__m512)factor_);
    // What x is above the next smaller whole number.
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const Floats f = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)x, kDown);
    return (Floats)_mm512_maskz_scalef_ps(there, (__m512)power(f), (__m512)x);
#else
    const Ints gone = (Ints)(d < least_);
    x = choose_lanes(gone, (Floats){}, d * factor_);
    const Floats shifter = splat(12582912.0f);
    const Floats shifted = x + shifter;
    const Floats nearest = shifted - shifter;
    const Ints above = (Ints)(nearest > x);
    const Floats f = x - choose_lanes(above, nearest - 1.0f, nearest);
    const Words bits = ((Words)shifted << 23) + ((Words)above << 23) + 0x3f800000u;
    return choose_lanes(gone, (Floats){}, power(f) * (Floats)bits);
#endif
  }

 private:
  static constexpr float kLargest = 3.4028234e38f;

  // 2^f for f in [0, 1], minimax, exact at both ends: relative error 1.1e-7. Degree 4 would be 2.8e-6
  // off, which lse and entropies of a whole row would share.
  static MIMKERNELS_INLINE Floats power(Floats f) {
    Floats y = mul_add(splat(0.00188090268f), f, splat(0.00898645725f));
    y = mul_add(y, f, splat(0.0558233783f));
    y = mul_add(y, f, splat(0.240157187f));
    y = mul_add(y, f, splat(0.69315207f));
    return mul_add(y, f, splat(1.0f));
  }

  Floats factor_;
  Floats least_;  // d from which it is not 0
};

// x = 2^e * m with m in [sqrt(1/2), sqrt(2)) and log(m) = f - curve, for finite x > 0.
struct LogParts {
  Floats e;
  Floats f;
  Floats curve;
};

MIMKERNELS_INLINE LogParts log_parts(Floats x) {
  const Ints tiny = (Ints)(x < splat(1.17549435e-38f));
  const Floats scaled = choose_lanes(tiny, x * 8388608.0f, x);
  const Words offset = (Words)scaled - 0x3f3504f3u;
  const Ints exponent = ((Ints)offset >> 23) - (tiny & 23);
  const Floats m = (Floats)((offset & 0x007fffffu) + 0x3f3504f3u);
  // log(1 + f) = f - s * (f - R) with s = f / (2 + f), R = 2 s^2 / 3 + 2 s^4 / 5 + ...
  const Floats f = m - 1.0f;
  const Floats s = f / (f + 2.0f);
  const Floats z = s * s;
  Floats tail = splat(2.0f / 9.0f);
  tail = mul_add(tail, z, splat(2.0f / 7.0f));
  tail = mul_add(tail, z, splat(2.0f / 5.0f));
  tail = mul_add(tail, z, splat(2.0f / 3.0f));
  tail *= z;
  return {__builtin_convertvector(exponent, Floats), f, s * (f - tail)};
}

// A number as an unevaluated sum, low being far smaller than high.
struct Split {
  Floats high;
  Floats low;
};

// a + b, exactly where nothing overflows.
MIMKERNELS_INLINE Split exact_sum(Floats a, Floats b) {
  const Floats high = a + b;
  const Floats part = high - a;
  return {high, (a - (high - part)) + (b - part)};
}

// log(x) for finite x > 0, whose sum with a number is rounded once; NaN for NaN, any for others.
MIMKERNELS_INLINE Split split_log(Floats x) {
  const LogParts parts = log_parts(x);
  const Split sum = exact_sum(parts.e * 0.693359375f, parts.f);
  const Floats low = sum.low + mul_add(parts.e, splat(-2.12194440e-4f), -parts.curve);
  return {choose_lanes((Ints)(x == x), sum.high, x), low};
}

// log(x) for x >= 0, at most 1 unit in the last place off; -inf for 0, NaN for NaN.
MIMKERNELS_INLINE Floats log_lanes(Floats x) {
  const LogParts parts = log_parts(x);
  const Floats small = mul_add(parts.e, splat(-2.12194440e-4f), -parts.curve);
  Floats out = mul_add(parts.e, splat(0.693359375f), parts.f + small);
  out = choose_lanes((Ints)(x == 0.0f), splat(-kInfinity), out);
  // Infinity stays, NaN stays.
  return choose_lanes((Ints)(x < splat(kInfinity)), out, x);
}

}  // namespace mimkernels::MIMKERNELS_ISA

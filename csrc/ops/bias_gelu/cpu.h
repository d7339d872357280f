// GELU and its derivative, one register at a time.
//
// gelu(x) = x F(x), F the normal distribution function, or the logistic function that the tanh
// approximation puts in its place. Both are symmetric, F(x) = 1 - F(-x): everything is computed
// at -|x|, where F keeps its relative accuracy down to the smallest floats, and mirrored.
// Infinity and NaN as x F(x) and F(x) + x F'(x) give them: gelu(-inf) and both slopes are NaN.
#pragma once

#include "cpu/attention/math.h"
#include "cpu/rows.h"
#include "ops/bias_gelu/params.h"

namespace mimkernels::MIMKERNELS_ISA {

// F(-|x|) and gelu'(-|x|). A caller that uses one of them pays for one.
struct GeluTail {
  Floats mass;
  Floats slope;
};

// c - a * b
MIMKERNELS_INLINE Floats mul_sub_from(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return c - a * b;
#endif
}

// 2^-(a * b) for a * b in [0, 127.4], at most 2 units in the last place off besides the rounding of
// the product's factors; 0 from 126.5 up. The polynomials here are summed in pairs: what bounds
// these loops is how long one register takes, not how many operations.
MIMKERNELS_INLINE Floats exp2_minus(Floats a, Floats b) {
  // Adding 1.5 * 2^23 rounds to an integer n; with 127 more, the low bits of the sum are the
  // exponent of 2^n, 0 for n = -127.
  const Floats shifter = splat(12583039.0f);
  const Floats shifted = mul_sub_from(a, b, shifter);
  const Floats n = shifted - shifter;
  const Floats f = mul_add(a, b, n);
  // 2^-f, minimax on |f| <= 1/2, the first coefficient kept at 1: relative error 2e-9.
  const Floats f2 = f * f;
  Floats high = mul_add(f, splat(-1.33999346e-3f), splat(9.61848896e-3f));
  high = mul_add(f2, splat(1.53458204e-4f), high);
  const Floats middle = mul_add(f, splat(-5.55032877e-2f), splat(0.240226469f));
  const Floats low = mul_add(f, splat(-0.693147206f), splat(1.0f));
  const Floats y = mul_add(mul_add(high, f2, middle), f2, low);
  return y * (Floats)((Words)shifted << 23);
}

// The normal distribution: F(-a) = exp(-a * a / 2) P(a) / Q(a). P / Q is the minimax approximation
// of erfcx(a / sqrt(2)) / 2 on [0, 13.27], relative error 5e-9; its coefficients are positive, so
// that nothing cancels.
MIMKERNELS_INLINE GeluTail erf_tail(Floats x) {
  const Floats magnitude = (Floats)((Words)x & 0x7fffffffu);
  // From here on the exponential is 0.
  const Floats a = min_or_second(magnitude, splat(13.27f));
  const Floats a2 = a * a;
  const Floats density = exp2_minus(a2, splat(0.721347520f));
  Floats p = mul_add(a, splat(3.99672002e-2f), splat(0.1812562f));
  p = mul_add(a2, splat(4.01768789e-3f), p);
  p = mul_add(p, a2, mul_add(a, splat(0.435617684f), splat(0.5f)));
  Floats q = mul_add(a, splat(1.00707062e-2f), splat(0.100190321f));
  q = mul_add(q, a2, mul_add(a, splat(0.464246900f), splat(1.19427359f)));
  q = mul_add(q, a2, mul_add(a, splat(1.66912029f), splat(1.0f)));
  const Floats mass = density * (p / q);
  // F'(a) = exp(-a * a / 2) / sqrt(2 pi)
  return {mass, mul_add(density * -0.398942280f, magnitude, mass)};
}

// The logistic function: F(-a) = e / (1 + e), e = exp(-2 z), z = sqrt(2 / pi) (a + 0.044715 a^3).
MIMKERNELS_INLINE GeluTail tanh_tail(Floats x) {
  const Floats magnitude = (Floats)((Words)x & 0x7fffffffu);
  // From here on the exponential is 0.
  const Floats a = min_or_second(magnitude, splat(10.031f));
  const Floats a2 = a * a;
  const Floats e = exp2_minus(a, mul_add(a2, splat(0.102943240f), splat(2.30220820f)));
  const Floats mass = e / (e + 1.0f);
  // F'(a) = F(-a) (1 - F(-a)) 2 z'(a)
  const Floats inner = mul_add(a2, splat(0.214064449f), splat(1.59576912f));
  return {mass, mass - magnitude * (mass * (1.0f - mass) * inner)};
}

template <bool kTanh>
MIMKERNELS_INLINE GeluTail gelu_tail(Floats x) {
  if constexpr (kTanh) {
    return tanh_tail(x);
  } else {
    return erf_tail(x);
  }
}

template <bool kTanh>
MIMKERNELS_INLINE Floats gelu(Floats x) {
  const Floats mass = gelu_tail<kTanh>(x).mass;
  return x * choose_lanes((Ints)x < 0, mass, 1.0f - mass);
}

template <bool kTanh>
MIMKERNELS_INLINE Floats gelu_slope(Floats x) {
  const Floats slope = gelu_tail<kTanh>(x).slope;
  return choose_lanes((Ints)x < 0, slope, 1.0f - slope);
}

// The bias in fp32; without one, zeros whose addition changes no bit, the sign of 0 included.
MIMKERNELS_INLINE void widen_bias(float* out, bool given, const void* bias, DType dtype,
                                  int64_t n) {
  if (!given) {
    for (int64_t i = 0; i < n; ++i) out[i] = -0.0f;
    return;
  }
  with_float_type(dtype, [&](auto type) {
    set_acc(out, static_cast<const decltype(type)*>(bias), n);
    return Status{};
  });
}

// Calls body(T{}, tanh) with the element type and, as a constant, the kind of gelu.
template <typename Body>
MIMKERNELS_INLINE Status with_gelu_type(DType dtype, bool tanh, const Body& body) {
  return with_float_type(dtype, [&](auto type) {
    return tanh ? body(type, std::true_type{}) : body(type, std::false_type{});
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

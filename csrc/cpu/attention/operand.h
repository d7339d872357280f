// What the register-tiled products read: fp32 numbers, or bf16 numbers in pairs.
//
// One step of a product takes kDepth<E> neighbours of each row of A and as many rows of B. With
// pairs, a lane of B's register holds two rows of one column, the even row in the low half, so that
// a step is one dot product of pairs per lane.
//
// numerics: a product of two bf16 is exact in fp32; a lane adds the odd product, then the even one,
//           each rounded to nearest even. The bf16 instructions take subnormals for 0, inputs and
//           sums; the emulation by shifts and masks keeps them, and agrees elsewhere.
#pragma once

#include "cpu/attention/math.h"
#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Products of bf16 tensors read pairs where the instruction set has their dot product, and in the
// build that tests this with the emulation.
#if defined(__AVX512BF16__) || defined(MIMKERNELS_BF16_PAIRS)
constexpr bool kBf16Pairs = true;
#else
constexpr bool kBf16Pairs = false;
#endif

// Calls body(T{}) with the element type of attention in this build: one with products of bf16 of its
// own, pairs or tiles, has bf16 alone. dispatch.cpp takes the rest from the set beneath.
template <typename Body>
MIMKERNELS_INLINE Status with_own_type([[maybe_unused]] DType dtype, const Body& body) {
#if defined(__AVX512BF16__) || defined(MIMKERNELS_BF16_PAIRS) || defined(MIMKERNELS_MATRIX_TILES)
  return body(bf16{});
#else
  return with_float_type(dtype, body);
#endif
}

// The element type of the products of tensors of T.
template <typename T>
using Operand = std::conditional_t<kBf16Pairs && std::is_same_v<T, bf16>, bf16, float>;

template <typename E>
constexpr int kDepth = std::is_same_v<E, bf16> ? 2 : 1;

// How many steps sum over `count` numbers, the last of a pair perhaps 0.
template <typename E>
MIMKERNELS_INLINE int64_t steps_of(int64_t count) {
  return ceil_div(count, kDepth<E>);
}

// ---- the step ----

MIMKERNELS_INLINE Floats load_operand(const float* src) { return load_floats(src); }
MIMKERNELS_INLINE Words load_operand(const bf16* src) {
  Words out;
  memcpy(&out, src, sizeof(out));
  return out;
}

MIMKERNELS_INLINE Floats spread_operand(const float* src) { return splat(*src); }
MIMKERNELS_INLINE Words spread_operand(const bf16* src) {
  uint32_t pair;
  memcpy(&pair, src, sizeof(pair));
  return pair - (Words){};
}

MIMKERNELS_INLINE Floats add_product(Floats a, Floats b, Floats sum) { return mul_add(a, b, sum); }
MIMKERNELS_INLINE Floats add_product(Words a, Words b, Floats sum) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum = mul_add((Floats)(a & 0xffff0000u), (Floats)(b & 0xffff0000u), sum);
  return mul_add((Floats)(a << 16), (Floats)(b << 16), sum);
#endif
}

// ---- packing ----

template <typename E>
MIMKERNELS_INLINE void store_operand(E* dst, Floats value) {
  memcpy(dst, &value, sizeof(value));
}

// The first `left` columns of a row, at most a register.
template <typename T>
MIMKERNELS_INLINE Floats load_columns(const T* src, int64_t left) {
  return left >= kLanes ? load_part<kLanes>(src) : load_some<kLanes>(src, left).v[0];
}

// A step's register of B: `columns` columns of the first of `rows` rows, or of the first two.
template <typename E, typename T>
MIMKERNELS_INLINE Floats load_step(const T* src, int64_t stride, int64_t rows, int64_t columns) {
  const Floats first = load_columns(src, columns);
  if constexpr (kDepth<E> == 1) {
    return first;
  } else {
    const Floats second = rows > 1 ? load_columns(src + stride, columns) : (Floats){};
    return (Floats)((Words)first >> 16 | (Words)second);
  }
}

// Weights of a product as it reads them: bf16, rounded, or fp32.
MIMKERNELS_INLINE void store_weights(float* dst, Floats value) { store_floats(dst, value); }
MIMKERNELS_INLINE void store_weights(bf16* dst, Floats value) {
#if defined(__AVX512BF16__)
  const __m512 lanes = (__m512)value;
  const __m256bh bits = _mm512_cvtneps_pbh(lanes);
  memcpy(dst, &bits, sizeof(bits));
#else
  store_part<kLanes>(dst, value);
#endif
}

// The weights of several registers.
template <typename E, int kCount>
MIMKERNELS_INLINE void store_weights(E* dst, const Floats (&values)[kCount]) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16> && kCount == 2) {
    const __m512bh bits = _mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
    memcpy(dst, &bits, sizeof(bits));
    return;
  }
#endif
  MIMKERNELS_UNROLL
  for (int i = 0; i < kCount; ++i) store_weights(dst + i * kLanes, values[i]);
}

}  // namespace mimkernels::MIMKERNELS_ISA

// The intrinsics of AVX-512 that the CPU kernels name, on AVX2, for tests: with the build option
// MIMKERNELS_EMULATE_AVX512 the compiler reads this file before every kernel of the sets above AVX2,
// whose vectors of 16 floats it then makes of two registers. With MIMKERNELS_EMULATE_AVX512_BF16 also
// those of bf16.
//
// Names stay those of the compiler, which declares them for AVX-512 alone: hence macros.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mimkernels::emulation::avx512 {

#define MIMKERNELS_EMULATED static inline __attribute__((always_inline))

struct Halves {
  __m256 low;
  __m256 high;
};

MIMKERNELS_EMULATED Halves split(__m512 x) {
  Halves halves;
  memcpy(&halves, &x, sizeof(x));
  return halves;
}

MIMKERNELS_EMULATED __m512 join(__m256 low, __m256 high) {
  const Halves halves = {low, high};
  __m512 x;
  memcpy(&x, &halves, sizeof(x));
  return x;
}

struct WordHalves {
  __m256i low;
  __m256i high;
};

MIMKERNELS_EMULATED WordHalves split(__m512i x) {
  WordHalves halves;
  memcpy(&halves, &x, sizeof(x));
  return halves;
}

MIMKERNELS_EMULATED __m512i join(__m256i low, __m256i high) {
  const WordHalves halves = {low, high};
  __m512i x;
  memcpy(&x, &halves, sizeof(x));
  return x;
}

template <typename Each, typename... Vectors>
MIMKERNELS_EMULATED auto by_halves(const Each& each, Vectors... x) {
  return join(each(split(x).low...), each(split(x).high...));
}

// Two of the four 128-bit parts of a, and two of b.
MIMKERNELS_EMULATED __m512i shuffle_parts(__m512i a, __m512i b, int order) {
  __m128i x[4], y[4];
  memcpy(x, &a, sizeof(a));
  memcpy(y, &b, sizeof(b));
  const __m128i parts[4] = {x[order & 3], x[order >> 2 & 3], y[order >> 4 & 3], y[order >> 6 & 3]};
  memcpy(&a, parts, sizeof(a));
  return a;
}

#define MIMKERNELS_HALVES(intrinsic) [](auto... halves) { return intrinsic(halves...); }

MIMKERNELS_EMULATED __m512 cvtph(__m256i bits) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)));
}

MIMKERNELS_EMULATED __m256i cvtps(__m512 x) {
  const Halves halves = split(x);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves.low, _MM_FROUND_TO_NEAREST_INT));
}

MIMKERNELS_EMULATED __m512i widen_words(__m256i x) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
              _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}

MIMKERNELS_EMULATED __m512i widen_bytes(__m128i x) {
  return join(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}

MIMKERNELS_EMULATED __m256i narrow_words(__m512i x) {
  uint32_t words[16];
  uint16_t halves[16];
  memcpy(words, &x, sizeof(x));
  for (int i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(words[i]);
  __m256i out;
  memcpy(&out, halves, sizeof(out));
  return out;
}

MIMKERNELS_EMULATED void stream(void* to, __m512i x) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(x) != 0) __builtin_trap();
  memcpy(to, &x, sizeof(x));
}

// ---- bf16, as Intel's manual has it: to nearest even, subnormal numbers are 0 ----

MIMKERNELS_EMULATED float flushed(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

MIMKERNELS_EMULATED float flushed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return flushed(bits);
}

MIMKERNELS_EMULATED uint16_t rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t top = bits >> 16;
  if ((bits & 0x7f800000u) == 0) return static_cast<uint16_t>(top & 0x8000u);
  if (x != x) return static_cast<uint16_t>(top | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (top & 1u)) >> 16);
}

// The numbers of one register after another.
template <typename Out, typename... In>
MIMKERNELS_EMULATED Out cvtne(In... registers) {
  float numbers[sizeof(Out) / 2];
  char* at = reinterpret_cast<char*>(numbers);
  ((memcpy(at, &registers, sizeof(registers)), at += sizeof(registers)), ...);
  uint16_t bits[sizeof(Out) / 2];
  for (unsigned i = 0; i < sizeof(Out) / 2; ++i) bits[i] = rounded(numbers[i]);
  Out out;
  memcpy(&out, bits, sizeof(out));
  return out;
}

template <typename V>
MIMKERNELS_EMULATED V permute(V order, V x) {
  constexpr unsigned kCount = sizeof(V) / 2;
  uint16_t from[kCount], numbers[kCount], to[kCount];
  memcpy(from, &order, sizeof(V));
  memcpy(numbers, &x, sizeof(V));
  for (unsigned i = 0; i < kCount; ++i) to[i] = numbers[from[i] % kCount];
  memcpy(&x, to, sizeof(V));
  return x;
}

// The odd product of each pair is added first, and the sum rounded in between.
MIMKERNELS_EMULATED __m512 dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  float sums[16];
  uint32_t first[16], second[16];
  memcpy(sums, &sum, sizeof(sum));
  memcpy(first, &a, sizeof(a));
  memcpy(second, &b, sizeof(b));
  for (int i = 0; i < 16; ++i) {
    const uint32_t odd[] = {first[i] & 0xffff0000u, second[i] & 0xffff0000u};
    const uint32_t even[] = {first[i] << 16, second[i] << 16};
    sums[i] = flushed(__builtin_fmaf(flushed(odd[0]), flushed(odd[1]), flushed(sums[i])));
    sums[i] = flushed(__builtin_fmaf(flushed(even[0]), flushed(even[1]), sums[i]));
  }
  memcpy(&sum, sums, sizeof(sum));
  return sum;
}

}  // namespace mimkernels::emulation::avx512

#define MIMKERNELS_BY_HALVES(intrinsic, ...) \
  mimkernels::emulation::avx512::by_halves(MIMKERNELS_HALVES(intrinsic), __VA_ARGS__)

#undef _mm512_maskz_cvtps_ph
#undef _mm512_maskz_extractf32x8_ps
#undef _mm512_maskz_shuffle_i32x4
#define _mm512_fmadd_ps(a, b, c) MIMKERNELS_BY_HALVES(_mm256_fmadd_ps, a, b, c)
#define _mm512_fnmadd_ps(a, b, c) MIMKERNELS_BY_HALVES(_mm256_fnmadd_ps, a, b, c)
#define _mm512_maskz_max_ps(all, a, b) MIMKERNELS_BY_HALVES(_mm256_max_ps, a, b)
#define _mm512_maskz_min_ps(all, a, b) MIMKERNELS_BY_HALVES(_mm256_min_ps, a, b)
#define _mm512_maskz_rsqrt14_ps(all, a) (1.0f / MIMKERNELS_BY_HALVES(_mm256_sqrt_ps, a))
#define _mm512_maskz_extractf32x8_ps(all, a, half)       \
  ((half) ? mimkernels::emulation::avx512::split(a).high \
          : mimkernels::emulation::avx512::split(a).low)
#define _mm512_maskz_unpacklo_epi32(all, a, b) MIMKERNELS_BY_HALVES(_mm256_unpacklo_epi32, a, b)
#define _mm512_maskz_unpackhi_epi32(all, a, b) MIMKERNELS_BY_HALVES(_mm256_unpackhi_epi32, a, b)
#define _mm512_maskz_unpacklo_epi64(all, a, b) MIMKERNELS_BY_HALVES(_mm256_unpacklo_epi64, a, b)
#define _mm512_maskz_unpackhi_epi64(all, a, b) MIMKERNELS_BY_HALVES(_mm256_unpackhi_epi64, a, b)
#define _mm512_maskz_shuffle_i32x4(all, a, b, order) \
  mimkernels::emulation::avx512::shuffle_parts(a, b, order)
#define _mm512_maskz_cvtepu16_epi32(all, a) mimkernels::emulation::avx512::widen_words(a)
#define _mm512_maskz_cvtepu8_epi32(all, a) mimkernels::emulation::avx512::widen_bytes(a)
#define _mm512_maskz_cvtepi32_epi16(all, a) mimkernels::emulation::avx512::narrow_words(a)
#define _mm512_maskz_cvtph_ps(all, bits) mimkernels::emulation::avx512::cvtph(bits)
#define _mm512_maskz_cvtps_ph(all, a, rounding) mimkernels::emulation::avx512::cvtps(a)
#define _mm512_stream_si512(to, a) mimkernels::emulation::avx512::stream(to, a)
#define __AVX512F__ 1

#if defined(MIMKERNELS_EMULATE_AVX512_BF16)
#define _mm512_cvtneps_pbh(a) mimkernels::emulation::avx512::cvtne<__m256bh>(a)
#define _mm512_cvtne2ps_pbh(high, low) mimkernels::emulation::avx512::cvtne<__m512bh>(low, high)
#undef _mm512_maskz_extracti64x4_epi64
#define _mm512_maskz_extracti64x4_epi64(all, a, half)    \
  ((half) ? mimkernels::emulation::avx512::split(a).high \
          : mimkernels::emulation::avx512::split(a).low)
#define _mm512_permutexvar_epi16(order, a) mimkernels::emulation::avx512::permute(order, a)
#define _mm512_dpbf16_ps(sum, a, b) mimkernels::emulation::avx512::dpbf16(sum, a, b)
#define __AVX512BF16__ 1
#endif

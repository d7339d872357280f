// Small fixed-width vectors on GCC's vector extensions, compiled once per instruction set.
//
// Pack<N> holds N floats in as many registers as the instruction set needs, so that one source
// gives the same bits everywhere: sums run over the same lanes in the same order on every
// instruction set, and nothing contracts to fma (the build passes -ffp-contract=off). Intrinsics
// appear only where the extensions cannot say it: fp16 conversion and streaming stores.
//
// Everything in files that include this lives in namespace mimkernels::MIMKERNELS_ISA. A template
// or inline symbol shared between instruction sets could be resolved to one the CPU cannot run.
#pragma once

#ifndef MIMKERNELS_ISA
#error "compile csrc/cpu with -DMIMKERNELS_ISA=<name>, once per instruction set"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__x86_64__)
#include <emmintrin.h>  // for streaming stores; the compiler reads it in a twentieth of the time
#endif

#define MIMKERNELS_INLINE inline __attribute__((always_inline))
#define MIMKERNELS_LAMBDA_INLINE __attribute__((always_inline))
#define MIMKERNELS_UNROLL _Pragma("GCC unroll 16")

namespace mimkernels::MIMKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Storage-only element types.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <int L>
struct VecTypes {
  typedef float F __attribute__((vector_size(L * 4)));
  typedef double D __attribute__((vector_size(L * 8)));
  typedef int32_t I __attribute__((vector_size(L * 4)));
  typedef uint32_t U __attribute__((vector_size(L * 4)));
  typedef uint16_t H __attribute__((vector_size(L * 2)));
  typedef uint8_t B __attribute__((vector_size(L)));
};

template <int N>
struct Pack {
  static constexpr int kWidth = N < kLanes ? N : kLanes;
  static constexpr int kParts = N / kWidth;
  using Vec = VecTypes<kWidth>;
  typename Vec::F v[kParts];
};

using Pack16 = Pack<16>;

// ---- one register ----

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::F load_part(const float* src) {
  typename VecTypes<L>::F out;
  memcpy(&out, src, sizeof(out));
  return out;
}

// Numbers of 8 and 16 bits in 32 bits, and 16 bits of 32. Told by intrinsics: GCC makes up to 40
// instructions of a conversion of 16 numbers.
template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::U widen(typename VecTypes<L>::H raw) {
  using U = typename VecTypes<L>::U;
#if defined(__AVX512F__)
  if constexpr (L == 16) return (U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)raw);
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) return (U)_mm256_cvtepu16_epi32((__m128i)raw);
#endif
  return __builtin_convertvector(raw, U);
}

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::I widen(const uint8_t* src) {
  using I = typename VecTypes<L>::I;
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    return (I)_mm512_maskz_cvtepu8_epi32(0xffff, raw);
  }
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) {
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)));
  }
#endif
  typename VecTypes<L>::B raw;
  memcpy(&raw, src, sizeof(raw));
  return __builtin_convertvector(raw, I);
}

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::H narrow(typename VecTypes<L>::U words) {
  using H = typename VecTypes<L>::H;
#if defined(__AVX512F__)
  if constexpr (L == 16) return (H)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) {
    // None is above 0xffff.
    return (H)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)words),
                               _mm256_extracti128_si256((__m256i)words, 1));
  }
#endif
  return __builtin_convertvector(words, H);
}

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::F load_part(const bf16* src) {
  typename VecTypes<L>::H raw;
  memcpy(&raw, src, sizeof(raw));
  return (typename VecTypes<L>::F)(widen<L>(raw) << 16);
}

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::F load_part(const uint8_t* src) {
  return __builtin_convertvector(widen<L>(src), typename VecTypes<L>::F);
}

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::F load_part(const fp16* src) {
#if defined(__F16C__)
  if constexpr (L == 4) {
    return (typename VecTypes<L>::F)_mm_cvtph_ps(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)));
  } else if constexpr (L == 8) {
    return (typename VecTypes<L>::F)_mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  } else {
#if defined(__AVX512F__)
    return (typename VecTypes<L>::F)_mm512_maskz_cvtph_ps(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
#endif
  }
#else
  using F = typename VecTypes<L>::F;
  using U = typename VecTypes<L>::U;
  typename VecTypes<L>::H raw;
  memcpy(&raw, src, sizeof(raw));
  const U half = __builtin_convertvector(raw, U);
  const U sign = (half & 0x8000u) << 16;
  const U rest = half & 0x7fffu;
  const U normal = (rest << 13) + (112u << 23);
  // A subnormal half m * 2^-24: put m into the mantissa of 2^-14 and take 2^-14 away.
  const U tiny_bits = (rest << 13) + (113u << 23);
  const U tiny = (U)((F)tiny_bits - 6.103515625e-05f);
  // Infinity and NaN; a signalling NaN turns quiet, as the conversion instruction does it.
  const U quiet = (U)(rest > 0x7c00u) & 0x00400000u;
  const U special = ((rest << 13) | 0x7f800000u) | quiet;
  const U magnitude = rest >= 0x7c00u ? special : (rest < 0x0400u ? tiny : normal);
  return (F)(magnitude | sign);
#endif
}

// fp32 to bf16 bits: nearest even; NaN keeps its top bits and turns quiet; subnormals are kept.
// The bf16 conversion instructions flush subnormals, so no instruction set uses them here.
template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::U to_bf16_words(typename VecTypes<L>::F value) {
  using U = typename VecTypes<L>::U;
  const U bits = (U)value;
  const U top = bits >> 16;
  const U rounded = (bits + (top & 1u) + 0x7fffu) >> 16;
  return value != value ? top | 0x0040u : rounded;
}

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::H to_bf16_bits(typename VecTypes<L>::F value) {
  return narrow<L>(to_bf16_words<L>(value));
}

template <int L>
MIMKERNELS_INLINE typename VecTypes<L>::H to_fp16_bits(typename VecTypes<L>::F value) {
  using H = typename VecTypes<L>::H;
#if defined(__F16C__)
  H out;
  if constexpr (L == 4) {
    const __m128i bits = _mm_cvtps_ph((__m128)value, _MM_FROUND_TO_NEAREST_INT);
    memcpy(&out, &bits, sizeof(out));
  } else if constexpr (L == 8) {
    const __m128i bits = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
    memcpy(&out, &bits, sizeof(out));
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
    memcpy(&out, &bits, sizeof(out));
#endif
  }
  return out;
#else
  using F = typename VecTypes<L>::F;
  using U = typename VecTypes<L>::U;
  const U bits = (U)value;
  const U sign = (bits >> 16) & 0x8000u;
  const U rest = bits & 0x7fffffffu;
  // Normal halves: round the mantissa in place and rebase the exponent; overflow carries to
  // infinity.
  const U normal = (rest - (112u << 23) + 0x0fffu + ((rest >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the half's subnormal bits, rounded, at the mantissa's low end.
  const U tiny = (U)((F)rest + 0.5f) - 0x3f000000u;
  const U nan = 0x7e00u | ((rest >> 13) & 0x03ffu);
  const U infinity = rest - rest + 0x7c00u;
  U half = rest < 0x38800000u ? tiny : normal;
  half = rest >= 0x47800000u ? infinity : half;
  half = rest > 0x7f800000u ? nan : half;
  return __builtin_convertvector(half | sign, H);
#endif
}

template <int L>
MIMKERNELS_INLINE void store_part(float* dst, typename VecTypes<L>::F value) {
  memcpy(dst, &value, sizeof(value));
}

template <int L>
MIMKERNELS_INLINE void store_part(bf16* dst, typename VecTypes<L>::F value) {
  const typename VecTypes<L>::H bits = to_bf16_bits<L>(value);
  memcpy(dst, &bits, sizeof(bits));
}

template <int L>
MIMKERNELS_INLINE void store_part(fp16* dst, typename VecTypes<L>::F value) {
  const typename VecTypes<L>::H bits = to_fp16_bits<L>(value);
  memcpy(dst, &bits, sizeof(bits));
}

// Bytes of one register past the cache; dst is aligned to the register.
template <typename V>
MIMKERNELS_INLINE void stream_bits(void* dst, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), (__m512i)value);
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), (__m256i)value);
    return;
  }
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst), (__m128i)value);
    return;
  }
  if constexpr (sizeof(V) == 8) {
    long long bits;
    memcpy(&bits, &value, sizeof(bits));
    _mm_stream_si64(reinterpret_cast<long long*>(dst), bits);
    return;
  }
#endif
  memcpy(dst, &value, sizeof(value));
}

template <int L>
MIMKERNELS_INLINE void stream_part(float* dst, typename VecTypes<L>::F value) {
  stream_bits(dst, value);
}

template <int L>
MIMKERNELS_INLINE void stream_part(bf16* dst, typename VecTypes<L>::F value) {
  stream_bits(dst, to_bf16_bits<L>(value));
}

template <int L>
MIMKERNELS_INLINE void stream_part(fp16* dst, typename VecTypes<L>::F value) {
  stream_bits(dst, to_fp16_bits<L>(value));
}

// ---- N lanes ----

template <int N, typename T>
MIMKERNELS_INLINE Pack<N> load(const T* src) {
  Pack<N> out;
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    out.v[p] = load_part<Pack<N>::kWidth>(src + p * Pack<N>::kWidth);
  }
  return out;
}

// The first n lanes from memory, the others 0.
template <int N, typename T>
MIMKERNELS_INLINE Pack<N> load_some(const T* src, int64_t n) {
  alignas(64) T buffer[N];
  memset(buffer, 0, sizeof(buffer));
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = src[i];
  }
  return load<N>(buffer);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Both registers of a Pack16 narrowed with one shuffle.
MIMKERNELS_INLINE VecTypes<16>::H to_bf16_bits(const Pack16& value) {
  const __m256i packed = _mm256_packus_epi32((__m256i)to_bf16_words<8>(value.v[0]),
                                             (__m256i)to_bf16_words<8>(value.v[1]));
  return (VecTypes<16>::H)_mm256_permute4x64_epi64(packed, 0xD8);
}

#endif

template <int N, typename T>
MIMKERNELS_INLINE void store(T* dst, const Pack<N>& value) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (N == 16 && std::is_same_v<T, bf16>) {
    const VecTypes<16>::H bits = to_bf16_bits(value);
    memcpy(dst, &bits, sizeof(bits));
    return;
  }
#endif
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    store_part<Pack<N>::kWidth>(dst + p * Pack<N>::kWidth, value.v[p]);
  }
}

template <int N, typename T>
MIMKERNELS_INLINE void store_some(T* dst, const Pack<N>& value, int64_t n) {
  alignas(64) T buffer[N];
  store<N>(buffer, value);
  for (int64_t i = 0; i < n; ++i) {
    dst[i] = buffer[i];
  }
}

template <int N, typename T>
MIMKERNELS_INLINE void stream(T* dst, const Pack<N>& value) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (N == 16 && std::is_same_v<T, bf16>) {
    stream_bits(dst, to_bf16_bits(value));
    return;
  }
#endif
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    stream_part<Pack<N>::kWidth>(dst + p * Pack<N>::kWidth, value.v[p]);
  }
}

// Makes streamed bytes visible before another thread is told that they are there.
MIMKERNELS_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <int N>
MIMKERNELS_INLINE Pack<N> broadcast(float value) {
  Pack<N> out;
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    out.v[p] = value - (typename Pack<N>::Vec::F){};
  }
  return out;
}

template <int N>
MIMKERNELS_INLINE Pack<N> operator+(Pack<N> a, const Pack<N>& b) {
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) a.v[p] += b.v[p];
  return a;
}

template <int N>
MIMKERNELS_INLINE Pack<N> operator-(Pack<N> a, const Pack<N>& b) {
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) a.v[p] -= b.v[p];
  return a;
}

template <int N>
MIMKERNELS_INLINE Pack<N> operator*(Pack<N> a, const Pack<N>& b) {
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) a.v[p] *= b.v[p];
  return a;
}

template <int N>
MIMKERNELS_INLINE Pack<N> operator/(Pack<N> a, const Pack<N>& b) {
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) a.v[p] /= b.v[p];
  return a;
}

template <int N>
MIMKERNELS_INLINE Pack<N> abs(Pack<N> a) {
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    a.v[p] = (typename Pack<N>::Vec::F)((typename Pack<N>::Vec::U)a.v[p] & 0x7fffffffu);
  }
  return a;
}

// -1, 0 or 1; NaN gives 0, as torch.sign does.
template <int N>
MIMKERNELS_INLINE Pack<N> sign(Pack<N> a) {
  using F = typename Pack<N>::Vec::F;
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) {
    a.v[p] = __builtin_convertvector((a.v[p] < (F){}) - (a.v[p] > (F){}), F);
  }
  return a;
}

// a < b ? yes : no, lane by lane.
template <int N>
MIMKERNELS_INLINE Pack<N> where_less(const Pack<N>& a, const Pack<N>& b, const Pack<N>& yes,
                                     const Pack<N>& no) {
  Pack<N> out;
  MIMKERNELS_UNROLL
  for (int p = 0; p < Pack<N>::kParts; ++p) out.v[p] = a.v[p] < b.v[p] ? yes.v[p] : no.v[p];
  return out;
}

// The first n lanes, the others 0.
template <int N>
MIMKERNELS_INLINE Pack<N> keep_first(const Pack<N>& value, int64_t n) {
  alignas(64) float lanes[N];
  store<N>(lanes, value);
  for (int64_t i = n; i < N; ++i) lanes[i] = 0.0f;
  return load<N>(lanes);
}

// The sum of all lanes, halves onto halves: the same order on every instruction set.
template <int N>
MIMKERNELS_INLINE float sum_lanes(Pack<N> value) {
  constexpr int kWidth = Pack<N>::kWidth;
  MIMKERNELS_UNROLL
  for (int half = Pack<N>::kParts / 2; half > 0; half /= 2) {
    MIMKERNELS_UNROLL
    for (int p = 0; p < half; ++p) value.v[p] += value.v[p + half];
  }
  MIMKERNELS_UNROLL
  for (int half = kWidth / 2; half > 0; half /= 2) {
    typename Pack<N>::Vec::I upper = {};
    MIMKERNELS_UNROLL
    for (int l = 0; l < kWidth; ++l) upper[l] = (l + half) % kWidth;
    value.v[0] += __builtin_shuffle(value.v[0], upper);
  }
  return value.v[0][0];
}

MIMKERNELS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MIMKERNELS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
MIMKERNELS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mimkernels::MIMKERNELS_ISA

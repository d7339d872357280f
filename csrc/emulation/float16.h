// The two 16-bit float types of CUDA, with its names for their conversions and arithmetic. Every
// result is rounded once, to nearest even.
#pragma once

#include <cuda_runtime.h>

// A namespace of its own: the functions above these types in emulation.h must not be found through
// them, where a kernel means those of device.cuh.
namespace mimkernels::emulation::floats {

struct HalfFormat {
  static __forceinline__ uint16_t bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return 0x7fff;
    }
    if (magnitude >= 0x477ff000u) {  // 65520: rounds past the largest
      return static_cast<uint16_t>(sign | 0x7c00u);
    }
    uint32_t rounded;
    if (magnitude < 0x38800000u) {
      // Subnormal: 2^-24 becomes the last bit of a float, whose own rounding does the work.
      rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    return static_cast<uint16_t>(sign | rounded);
  }
  static __forceinline__ float value(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {
      return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    }
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
  }
};

struct BFloat16Format {
  static __forceinline__ uint16_t bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
      return 0x7fff;
    }
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  static __forceinline__ float value(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

// a b + c in double, the last bit made odd where the sum is not exact: rounding that again, to
// fewer bits, gives what rounding the exact value once would.
__forceinline__ double fma_to_odd(double a, double b, double c) {
  const double product = a * b;  // exact: both have at most 11 bits
  const double sum = product + c;
  const double back = sum - product;
  const double rest = (product - (sum - back)) + (c - back);
  if (rest == 0.0 || !isfinite(sum)) {
    return sum;
  }
  uint64_t bits;
  __builtin_memcpy(&bits, &sum, sizeof(bits));
  if ((bits & 1u) == 0) {
    bits += (rest > 0.0) == (sum > 0.0) ? 1 : -1;
  }
  double odd;
  __builtin_memcpy(&odd, &bits, sizeof(odd));
  return odd;
}

// The same property for a double that becomes a float on its way to 16 bits.
__forceinline__ float to_float_odd(double x) {
  const float rounded = static_cast<float>(x);
  if (static_cast<double>(rounded) == x || !isfinite(rounded)) {
    return rounded;
  }
  uint32_t bits = __float_as_uint(rounded);
  if (fabs(static_cast<double>(rounded)) > fabs(x)) {
    --bits;
  }
  return __uint_as_float(bits | 1u);
}

template <typename Format>
struct Float16 {
  uint16_t bits;

  Float16() = default;
  Float16(float x) : bits(Format::bits(x)) {}
  Float16(double x) : bits(Format::bits(to_float_odd(x))) {}
  Float16(int x) : Float16(static_cast<double>(x)) {}
  operator float() const { return Format::value(bits); }

  static Float16 of_bits(uint16_t bits) {
    Float16 made;
    made.bits = bits;
    return made;
  }
  Float16 operator-() const { return of_bits(bits ^ 0x8000u); }
  Float16& operator+=(Float16 other) { return *this = *this + other; }
  Float16& operator-=(Float16 other) { return *this = *this - other; }
  Float16& operator*=(Float16 other) { return *this = *this * other; }
  Float16& operator/=(Float16 other) { return *this = *this / other; }
  friend Float16 operator+(Float16 a, Float16 b) {
    return Format::value(a.bits) + Format::value(b.bits);
  }
  friend Float16 operator-(Float16 a, Float16 b) {
    return Format::value(a.bits) - Format::value(b.bits);
  }
  friend Float16 operator*(Float16 a, Float16 b) {
    return Format::value(a.bits) * Format::value(b.bits);
  }
  friend Float16 operator/(Float16 a, Float16 b) {
    return Format::value(a.bits) / Format::value(b.bits);
  }
  friend bool operator==(Float16 a, Float16 b) {
    return Format::value(a.bits) == Format::value(b.bits);
  }
  friend bool operator<(Float16 a, Float16 b) {
    return Format::value(a.bits) < Format::value(b.bits);
  }
  friend bool operator>(Float16 a, Float16 b) {
    return Format::value(a.bits) > Format::value(b.bits);
  }
  friend bool operator<=(Float16 a, Float16 b) {
    return Format::value(a.bits) <= Format::value(b.bits);
  }
  friend bool operator>=(Float16 a, Float16 b) {
    return Format::value(a.bits) >= Format::value(b.bits);
  }
};

template <typename T>
struct alignas(4) Pair {
  T x, y;

  Pair() = default;
  Pair(T x, T y) : x(x), y(y) {}
  friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
  friend Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
  friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
};

using Half = Float16<HalfFormat>;
using BFloat16 = Float16<BFloat16Format>;

template <typename T>
concept AnyFloat16 = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

}  // namespace mimkernels::emulation::floats

#define MIMKERNELS_FLOAT16 template <::mimkernels::emulation::floats::AnyFloat16 T>
MIMKERNELS_FLOAT16 __forceinline__ T __hadd(T a, T b) { return a + b; }
MIMKERNELS_FLOAT16 __forceinline__ T __hsub(T a, T b) { return a - b; }
MIMKERNELS_FLOAT16 __forceinline__ T __hmul(T a, T b) { return a * b; }
MIMKERNELS_FLOAT16 __forceinline__ T __hdiv(T a, T b) { return a / b; }
MIMKERNELS_FLOAT16 __forceinline__ T __hneg(T a) { return -a; }
MIMKERNELS_FLOAT16 __forceinline__ T __habs(T a) { return T::of_bits(a.bits & 0x7fffu); }
MIMKERNELS_FLOAT16 __forceinline__ T __hfma(T a, T b, T c) {
  return T(::mimkernels::emulation::floats::fma_to_odd(static_cast<float>(a), static_cast<float>(b),
                                                       static_cast<float>(c)));
}
// With one NaN, of whatever kind, the other argument.
MIMKERNELS_FLOAT16 __forceinline__ T __hmax(T a, T b) {
  return isnan(static_cast<float>(a))   ? b
         : isnan(static_cast<float>(b)) ? a
                                        : T(fmaxf(static_cast<float>(a), static_cast<float>(b)));
}
MIMKERNELS_FLOAT16 __forceinline__ T __hmin(T a, T b) {
  return isnan(static_cast<float>(a))   ? b
         : isnan(static_cast<float>(b)) ? a
                                        : T(fminf(static_cast<float>(a), static_cast<float>(b)));
}
MIMKERNELS_FLOAT16 __forceinline__ bool __hisnan(T a) { return isnan(static_cast<float>(a)); }
MIMKERNELS_FLOAT16 __forceinline__ bool __heq(T a, T b) { return a == b; }
MIMKERNELS_FLOAT16 __forceinline__ bool __hlt(T a, T b) { return a < b; }
MIMKERNELS_FLOAT16 __forceinline__ bool __hgt(T a, T b) { return a > b; }

#define MIMKERNELS_PAIR(signature)                         \
  template <::mimkernels::emulation::floats::AnyFloat16 T> \
  __forceinline__::mimkernels::emulation::floats::Pair<T> signature
MIMKERNELS_PAIR(__hadd2)
(::mimkernels::emulation::floats::Pair<T> a, ::mimkernels::emulation::floats::Pair<T> b) {
  return a + b;
}
MIMKERNELS_PAIR(__hsub2)
(::mimkernels::emulation::floats::Pair<T> a, ::mimkernels::emulation::floats::Pair<T> b) {
  return a - b;
}
MIMKERNELS_PAIR(__hmul2)
(::mimkernels::emulation::floats::Pair<T> a, ::mimkernels::emulation::floats::Pair<T> b) {
  return a * b;
}
MIMKERNELS_PAIR(__hfma2)
(::mimkernels::emulation::floats::Pair<T> a, ::mimkernels::emulation::floats::Pair<T> b,
 ::mimkernels::emulation::floats::Pair<T> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
MIMKERNELS_PAIR(__hmax2)
(::mimkernels::emulation::floats::Pair<T> a, ::mimkernels::emulation::floats::Pair<T> b) {
  return {__hmax(a.x, b.x), __hmax(a.y, b.y)};
}
MIMKERNELS_PAIR(__hmin2)
(::mimkernels::emulation::floats::Pair<T> a, ::mimkernels::emulation::floats::Pair<T> b) {
  return {__hmin(a.x, b.x), __hmin(a.y, b.y)};
}
#undef MIMKERNELS_PAIR
#undef MIMKERNELS_FLOAT16

// What both directions of bias_gelu share: GELU and its derivative, and a block's piece of the
// work.
#pragma once

#include "cuda/device.cuh"
#include "cuda/sums.cuh"
#include "ops/bias_gelu/params.h"

namespace mimkernels::cuda {

// Rows that a thread works on at a time: as many loads in flight of each input.
constexpr int kRowsAtOnce = 4;

// Items of work: 32 words of the columns of a slice of the rows.
struct GeluTiling {
  int64_t words = 0;   // of a row
  int64_t chunks = 0;  // of a row
  int64_t slices = 0;  // of the rows
  int64_t per_slice = 0;
};

inline GeluTiling gelu_tiling(int64_t rows, int64_t dim, int vec) {
  GeluTiling tiling;
  tiling.words = dim / vec;
  tiling.chunks = ceil_div(tiling.words, kWarp);
  if (rows * dim == 0) {
    return tiling;
  }
  tiling.per_slice = slice_length(rows, tiling.chunks);
  tiling.slices = ceil_div(rows, tiling.per_slice);
  return tiling;
}

// gelu(x) = x F(x), F the normal distribution function, or the logistic function that the tanh
// approximation puts in its place: F(-|x|) and gelu'(-|x|), from which F(x) = 1 - F(-x) gives the
// other half. A caller that uses one of them pays for one.
struct GeluTail {
  float mass;
  float slope;
};

template <bool TANH>
__device__ __forceinline__ GeluTail gelu_tail(float x) {
  const float magnitude = fabsf(x);
  // From here on the exponentials are 0.
  const float a = fminf(magnitude, 20.0f);
  const float a2 = a * a;
  if constexpr (TANH) {
    // F(-a) = e / (1 + e), e = exp(-2 z), z = sqrt(2 / pi) (a + 0.044715 a^3)
    const float e = exp2_fast(-a * (0.102943240f * a2 + 2.30220820f));
    const float mass = e * reciprocal_fast(1.0f + e);
    const float inner = 0.214064449f * a2 + 1.59576912f;
    return {mass, mass - magnitude * (mass * (1.0f - mass) * inner)};
  } else {
    // F(-a) = exp(-a * a / 2) P(a) / Q(a), P / Q the minimax approximation of
    // erfcx(a / sqrt(2)) / 2 on [0, 13.27], relative error 5e-9
    const float density = exp2_fast(-0.721347520f * a2);
    float p = 4.01768789e-3f;
    p = p * a + 3.99672002e-2f;
    p = p * a + 0.1812562f;
    p = p * a + 0.435617684f;
    p = p * a + 0.5f;
    float q = 1.00707062e-2f;
    q = q * a + 0.100190321f;
    q = q * a + 0.464246900f;
    q = q * a + 1.19427359f;
    q = q * a + 1.66912029f;
    q = q * a + 1.0f;
    const float mass = density * (p * reciprocal_fast(q));
    return {mass, mass - 0.398942280f * density * magnitude};
  }
}

// gelu(x), rounded to T by the caller: for 16 bits by fewer operations, within a relative 1e-5.
template <typename T, bool TANH>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (TANH) {
    // F(x) = 1 / (1 + exp(-2 z)), z as below: where the exponential is infinite, F(x) is 0.
    const float z = x * (-0.102943240f * (x * x) - 2.30220820f);
    return x * reciprocal_fast(1.0f + exp2_fast(z));
  } else if constexpr (sizeof(T) == 4) {
    const float mass = gelu_tail<false>(x).mass;
    return x * (x < 0.0f ? mass : 1.0f - mass);
  } else {
    // F(-a) = exp(-a * a / 2) P(t), t = 1 / (1 + 0.31 a), P the minimax approximation of
    // erfcx(a / sqrt(2)) / 2 on [0, 13.4] without a constant term, relative error 5e-6. Beyond, the
    // exponential is 0 and P finite.
    const float t = reciprocal_fast(0.31f * fabsf(x) + 1.0f);
    float p = -0.0739340782f;
    p = p * t + 0.180464923f;
    p = p * t + 0.0157284960f;
    p = p * t + 0.133438215f;
    p = p * t + 0.120439261f;
    p = p * t + 0.123860881f;
    const float mass = exp2_fast(-0.721347520f * x * x) * t * p;
    return x * (x < 0.0f ? mass : 1.0f - mass);
  }
}

// Rows i of [A, R, E]: by one stride where images follow each other as rows do, which saves a
// division.
struct GeluRows {
  Rows rows;
  int64_t tokens = 0;
  bool even = false;

  GeluRows(const Rows& rows, int64_t batch, int64_t tokens)
      : rows(rows), tokens(tokens), even(batch <= 1 || rows.stride0 == tokens * rows.stride1) {}

  template <typename T>
  __device__ __forceinline__ const T* at(int64_t i) const {
    if (even) {
      return row_at<T>(rows, 0, i);
    }
    int64_t token;
    const int64_t image = divide(i, tokens, token);
    return row_at<T>(rows, image, token);
  }
};

// VEC elements of the bias from `column` on; without one, zeros whose addition changes no bit.
template <typename T, int VEC>
__device__ __forceinline__ void load_bias(float (&out)[VEC], bool given, const void* bias,
                                          bool fp32, int64_t column) {
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    out[e] = -0.0f;
  }
  if (!given) {
    return;
  }
  if (fp32 && !std::is_same_v<T, float>) {
    constexpr int kWords = VEC > 4 ? VEC / 4 : 1;
    using W = Word<float, VEC / kWords>;
    const W* const words = reinterpret_cast<const W*>(static_cast<const float*>(bias) + column);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const W word = __ldg(words + i);
      memcpy(out + i * (VEC / kWords), &word, sizeof(word));
    }
  } else {
    using W = Word<T, VEC>;
    accumulate<T, VEC>(out,
                       __ldg(reinterpret_cast<const W*>(static_cast<const T*>(bias) + column)));
  }
}

// Calls body(T{}, Vec, Tanh) with the types of a launch, the latter two as integral constants.
template <typename Body>
cudaError_t with_gelu_kind(DType dtype, bool aligned, bool tanh, const Body& body) {
  return with_float_type(dtype, [&](auto type) {
    const auto with_vec = [&](auto vec) {
      return tanh ? body(type, vec, std::true_type{}) : body(type, vec, std::false_type{});
    };
    return aligned ? with_vec(std::integral_constant<int, 16 / sizeof(type)>{})
                   : with_vec(std::integral_constant<int, 1>{});
  });
}

}  // namespace mimkernels::cuda

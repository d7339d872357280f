// What the pooling kernels share: which tokens are pooled, products with 16-byte words, and how the
// warps of a block split an image's tokens.
#pragma once

#include "core/token_pool.h"
#include "cuda/pooling/token_products.h"
#include "cuda/rows.cuh"

namespace mimkernels::cuda {

// Tokens that a thread works on at a time: as many loads in flight.
constexpr int kTokens = 4;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The tokens of [B, N] that may be pooled.
struct AllowedTokens {
  BoolMask mask;
  int64_t num_prefix = 0;
  int64_t tokens = 0;

  __device__ __forceinline__ bool operator()(int64_t b, int64_t n) const {
    return n >= num_prefix && n < tokens &&
           (!mask.given || __ldg(mask.data + b * mask.stride0 + n) != 0);
  }
};

inline AllowedTokens allowed_of(const TokenProducts& p) { return {p.mask, p.num_prefix, p.tokens}; }

// What a thread has loaded of COUNT tokens while it works on those before.
template <typename W, int COUNT>
struct Prefetched {
  W words[COUNT];
  bool wanted[COUNT];  // others are zeros
};

template <typename T, int VEC>
__device__ __forceinline__ void unpack_word(float (&values)[VEC], Word<T, VEC> word) {
  T elements[VEC];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    values[e] = to_float(elements[e]);
  }
}

// sums[e] += weight * word[e].
template <typename T, int VEC>
__device__ __forceinline__ void add_weighted(float (&sums)[VEC], float weight, Word<T, VEC> word) {
  float values[VEC];
  unpack_word<T, VEC>(values, word);
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    sums[e] = fmaf(weight, values[e], sums[e]);
  }
}

// sum + a . b.
template <typename T, int VEC>
__device__ __forceinline__ float add_dot(float sum, Word<T, VEC> a, Word<T, VEC> b) {
  float left[VEC];
  float right[VEC];
  unpack_word<T, VEC>(left, a);
  unpack_word<T, VEC>(right, b);
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    sum = fmaf(left[e], right[e], sum);
  }
  return sum;
}

// The largest over a warp, in every lane; NaN only where all are.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWarpMask, x, step));
  }
  return x;
}

// What a softmax is taken relative to; a row of -inf has weights exp(-inf - 0) = 0.
__device__ __forceinline__ float softmax_level(float most) {
  return most == kMinusInfinity ? 0.0f : most;
}

// 1 / total, 0 where nothing was summed.
__device__ __forceinline__ float softmax_inverse(float total) {
  return total == 0.0f ? 0.0f : 1.0f / total;
}

}  // namespace mimkernels::cuda

// Rows of D elements as rows of vectors: 16 bytes where every address allows it, one element
// elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mimkernels::cuda {

constexpr int kThreads = 256;

// The memory word of VEC elements of T. Copies move words, so that NaN payloads survive.
template <typename T, int VEC>
using Word = std::conditional_t<sizeof(T) * VEC == 16, uint4,
                                std::conditional_t<sizeof(T) * VEC == 4, uint32_t, uint16_t>>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// sums[e] += word[e], in fp32.
template <typename T, int VEC>
__device__ __forceinline__ void accumulate(float (&sums)[VEC], Word<T, VEC> word) {
  T elements[VEC];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    sums[e] += to_float(elements[e]);
  }
}

// The sums, rounded to T.
template <typename T, int VEC>
__device__ __forceinline__ Word<T, VEC> pack(const float (&sums)[VEC]) {
  T elements[VEC];
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    elements[e] = from_float<T>(sums[e]);
  }
  Word<T, VEC> word;
  memcpy(&word, elements, sizeof(word));
  return word;
}

// Quotient and remainder of numbers that nearly always fit 32 bits, where dividing is many times
// cheaper.
__device__ __forceinline__ int64_t divide(int64_t number, int64_t by, int64_t& remainder) {
  if (((number | by) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(number) / static_cast<uint32_t>(by);
    remainder = static_cast<uint32_t>(number) - quotient * static_cast<uint32_t>(by);
    return quotient;
  }
  const int64_t quotient = number / by;
  remainder = number - quotient * by;
  return quotient;
}

// Whether rows at `data + i * stride` (strides in elements of `size` bytes) all start on 16 bytes.
inline bool rows_aligned(const void* data, int64_t stride0, int64_t stride1, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride0 * size % 16 == 0 &&
         stride1 * size % 16 == 0;
}

// log2 of the threads that share a row of `vectors` vectors: a power of two, at most a warp.
inline int lanes_log2(int64_t vectors) {
  int log2 = 0;
  while (log2 < 5 && (int64_t{1} << log2) < vectors) {
    ++log2;
  }
  return log2;
}

// Blocks for `items` at `per_block` each; kernels loop, so that any number of items fits.
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t wanted = (items + per_block - 1) / per_block;
  constexpr int64_t kMost = int64_t{1} << 20;
  return static_cast<unsigned>(wanted < kMost ? wanted : kMost);
}

}  // namespace mimkernels::cuda

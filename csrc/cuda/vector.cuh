// Rows of D elements as rows of vectors: 16 bytes where every address allows it, one element
// elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"

namespace mimkernels::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kWarpMask = 0xffffffffu;

// The memory word of BYTES bytes.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<1> {
  using type = uint8_t;
};

// The memory word of VEC elements of T. Copies move words, so that NaN payloads survive.
template <typename T, int VEC>
using Word = typename WordOf<static_cast<int>(sizeof(T)) * VEC>::type;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(uint8_t x) { return static_cast<float>(x); }
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

// The sum over a warp, in every lane; by a tree, so in a fixed order.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(kWarpMask, x, step);
  }
  return x;
}

// Calls body(T{}) with the element type of a float dtype.
template <typename Body>
cudaError_t with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat16:
      return body(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Whether rows at `data + i * stride` (strides in elements of `size` bytes) all start on `bytes`
// bytes.
inline bool rows_aligned(const void* data, int64_t stride0, int64_t stride1, int64_t size,
                         int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride0 * size % bytes == 0 &&
         stride1 * size % bytes == 0;
}

// log2 of the threads that share a row of `vectors` vectors: a power of two, at most a warp.
inline int lanes_log2(int64_t vectors) {
  int log2 = 0;
  while (log2 < 5 && (int64_t{1} << log2) < vectors) {
    ++log2;
  }
  return log2;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr float kLog2E = 1.4426950408889634f;

// At most several times the blocks that a large device runs at once, so that looping costs nothing.
constexpr int64_t kMostBlocks = int64_t{1} << 14;

// Blocks for `items` at `per_block` each; kernels loop, so that any number of items fits.
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t wanted = ceil_div(items, per_block);
  return static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
}

// The same for a grid of `columns` by `rows` blocks, blockIdx.x and .y: kernels loop over both, and
// divide nothing to find out where they are.
inline dim3 blocks_for_grid(int64_t columns, int64_t rows) {
  const int64_t x = columns < kMostBlocks ? columns : kMostBlocks;
  const int64_t y = rows < kMostBlocks / x ? rows : kMostBlocks / x;
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

}  // namespace mimkernels::cuda

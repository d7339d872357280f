// Long sums: their roundings do not grow with the number of terms, even where little remains of
// them.
#pragma once

#include <type_traits>

#include "cuda/rows.cuh"

namespace mimkernels::cuda {

// An fp32 sum, and what its roundings have lost: about twice the digits of either. Only additions,
// which no compiler reorders without fast math.
struct CompensatedSum {
  float sum = 0.0f;
  float lost = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float next = sum + x;
    const float part = next - sum;
    lost += (sum - (next - part)) + (x - part);
    sum = next;
  }
  __device__ __forceinline__ void add(const CompensatedSum& other) {
    add(other.sum);
    lost += other.lost;
  }
  // Of infinity or NaN nothing is lost.
  __device__ __forceinline__ float rest() const { return lost == lost ? lost : 0.0f; }
  __device__ __forceinline__ float total() const { return sum + rest(); }
};

// An fp32 sum with the same interface. A result of 16 bits needs no more: fp32 has 13 bits beyond.
struct PlainSum {
  float sum = 0.0f;

  __device__ __forceinline__ void add(float x) { sum += x; }
  __device__ __forceinline__ void add(const PlainSum& other) { sum += other.sum; }
  __device__ __forceinline__ float total() const { return sum; }
};

// How many of `rows` are summed at a time: they are split into slices, of no fewer than 32, until the
// slices' `pieces` are the blocks that fill a large device several times over. Of constants, so that
// the order of a sum depends on the shape alone.
inline int64_t slice_length(int64_t rows, int64_t pieces) {
  constexpr int64_t kBlocksWanted = 1024;
  constexpr int64_t kLeastSlice = 32;
  const int64_t length = ceil_div(rows, ceil_div(kBlocksWanted, pieces));
  return length < kLeastSlice ? kLeastSlice : length;
}

// A sum of rows that is rounded to T.
template <typename T>
using RowSum = std::conditional_t<std::is_same_v<T, float>, CompensatedSum, PlainSum>;

// sums[e] += word[e].
template <typename T, int VEC, typename Sum>
__device__ __forceinline__ void add_word(Sum (&sums)[VEC], Word<T, VEC> word) {
  T elements[VEC];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    sums[e].add(to_float(elements[e]));
  }
}

// A partial sum is stored as itself and, `rests` elements further, what it has lost, which is one
// more part to sum_partials; without rests, rounded.
__device__ __forceinline__ void store_sum(float* to, int64_t rests, const CompensatedSum& sum) {
  to[0] = rests > 0 ? sum.sum : sum.total();
  if (rests > 0) {
    to[rests] = sum.rest();
  }
}
__device__ __forceinline__ void store_sum(float* to, int64_t, const PlainSum& sum) {
  *to = sum.sum;
}

// Bytes of shared memory that sum_warps takes for VEC elements per thread.
constexpr int sum_warps_bytes(int vec) {
  return 2 * kThreads * vec * static_cast<int>(sizeof(float));
}

// Leaves in the block's shared memory the sums over its warps, element e of lane l at e * 32 + l,
// for summed<VEC>. All threads of the block.
template <int VEC, typename Sum>
__device__ __forceinline__ void sum_warps(float* shared, const Sum (&sums)[VEC]) {
  constexpr bool kLost = std::is_same_v<Sum, CompensatedSum>;
  constexpr int kRests = kThreads * VEC;
  const int own = threadIdx.x / kWarp * VEC * kWarp + threadIdx.x % kWarp;
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    shared[own + e * kWarp] = sums[e].sum;
    if constexpr (kLost) {
      shared[kRests + own + e * kWarp] = sums[e].lost;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < VEC * kWarp; i += kThreads) {
    CompensatedSum sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum.add({shared[w * VEC * kWarp + i], kLost ? shared[kRests + w * VEC * kWarp + i] : 0.0f});
    }
    shared[i] = sum.sum;
    shared[kRests + i] = sum.lost;
  }
  __syncthreads();
}
template <int VEC>
__device__ __forceinline__ CompensatedSum summed(const float* shared, int place) {
  return {shared[place], shared[kThreads * VEC + place]};
}

}  // namespace mimkernels::cuda

// What warps that own strips of keys need beyond strips.cuh: numbers of the columns of a group, left
// operands from global memory, groups that other warps read transposed.
#pragma once

#include "cuda/attention/strips.cuh"

namespace mimkernels::cuda {

// Numbers of the queries that a lane has as columns of a group: 2t and 2t + 1, 8 + 2t and 9 + 2t.
__device__ __forceinline__ void load_columns(float (&x)[4], const float* of_group) {
  const float* const from = of_group + threadIdx.x % 4 * 2;
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const float2 pair = *reinterpret_cast<const float2*>(from + 8 * u);
    x[2 * u] = pair.x;
    x[2 * u + 1] = pair.y;
  }
}

// The fragments of STRIPS strips as left operand, from global memory: rows from `valid` on and
// features from `dim` on are zeros.
template <int STRIPS, int STEPS, typename T>
__device__ __forceinline__ void fetch_left(uint32_t (&left)[STRIPS][STEPS][4], const T* rows,
                                           int64_t stride, int valid, int dim, bool aligned) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
    for (int i = 0; i < STEPS * 4; ++i) {
      const int row = s * kStrip + lane / 4 + i % 2 * 8;
      const int feature = i / 4 * kStep<T> + i / 2 % 2 * 8 + lane % 4 * 2;
      const T* const from = rows + row * stride + feature;
      uint32_t word = 0;
      if (row < valid && feature < dim) {
        if (aligned) {
          word = *reinterpret_cast<const uint32_t*>(from);
        } else {
          const T pair[2] = {from[0], from[1]};
          memcpy(&word, pair, sizeof(word));
        }
      }
      left[s][i / 4][i % 4] = word;
    }
  }
}

__device__ __forceinline__ void copy_fragment(uint32_t (&to)[4], const uint32_t (&from)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[i] = from[i];
  }
}

// d += products of STRIPS strips with 16 rows at `right`, each loaded once for all strips; left(a, s,
// step) gives a step's fragments of strip s.
template <typename T, int STEPS, int STRIPS, typename Left>
__device__ __forceinline__ void add_strip_products(float (&d)[STRIPS][2][4], const T* right,
                                                   int stride, Left left) {
  const T* const row = right_row(right, stride);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    uint32_t b[4];
    load_matrices(b, row + step * kStep<T>);
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) {
      uint32_t a[4];
      left(a, s, step);
      multiply_add<T>(d[s][0], a, b[0], b[1]);
      multiply_add<T>(d[s][1], a, b[2], b[3]);
    }
  }
}

// The warp's strips of keys as left operand; KEPT: for as long as the warp needs them, in registers.
template <typename T, int STRIPS, int STEPS, bool KEPT>
struct LeftKeys {
  const T* rows[STRIPS];
  uint32_t kept[STRIPS][KEPT ? STEPS : 1][4];

  // A strip beyond the last has the last one's rows.
  __device__ __forceinline__ LeftKeys(const T* keys, int stride, int first, int strips) {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) {
      rows[s] = left_row(keys + min(first + s, strips - 1) * kStrip * stride, stride);
#pragma unroll
      for (int step = 0; KEPT && step < STEPS; ++step) {
        load_matrices(kept[s][step], rows[s] + step * kStep<T>);
      }
    }
  }

  __device__ __forceinline__ void operator()(uint32_t (&a)[4], int s, int step) const {
    if constexpr (KEPT) {
      copy_fragment(a, kept[s][step]);
    } else {
      load_matrices(a, rows[s] + step * kStep<T>);
    }
  }
};

// A packed group of keys by queries to 512 bytes of shared memory, from where load_transposed_group
// has it as left operand of queries by keys: four matrices of 8 x 8 one after the other, which
// neither stores nor loads meet in a bank twice.
template <typename T>
__device__ __forceinline__ void store_group(T* to, const uint32_t (&packed)[4]) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(to) + threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[(i % 2 * 2 + i / 2) * kWarp] = packed[i];
  }
}

template <typename T>
__device__ __forceinline__ void load_transposed_group(uint32_t (&left)[4], const T* from) {
  load_matrices_transposed(left, from + threadIdx.x % kWarp * kChunk<T>);
}

}  // namespace mimkernels::cuda

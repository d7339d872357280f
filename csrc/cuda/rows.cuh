// One pass that writes rows of D elements, each a row found elsewhere: the forward of the token
// ops.
#pragma once

#include <limits>

#include "core/params.h"
#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace mimkernels::cuda {

// Where an output row comes from: `row`, or zeros if null, plus `addend` unless that is null.
template <typename T>
struct RowSource {
  const T* row = nullptr;
  const T* addend = nullptr;
};

// grid:     blocks of 256 threads; 2^lanes_log2 threads (at most a warp) own ROWS rows of out, then
//           loop
// in:       whatever find.source<T>(row) points at, rows whose last stride is 1
// out:      out [rows, D] contiguous; every element written exactly once
// numerics: row + addend in fp32, rounded once; without addend the bits are copied
// bounds:   rows past the end are neither looked up nor written; offsets are int64
// cost:     each source row read once, each output row written once; ROWS * COLUMNS independent
//           loads in flight per thread; no shared memory, no atomics, deterministic
template <typename T, int VEC, int ROWS, bool ADDS, typename Find>
__global__ void __launch_bounds__(kThreads, 4)
    write_rows_kernel(Find find, T* out, int64_t rows, int vectors, int lanes_log2) {
  using W = Word<T, VEC>;
  constexpr int COLUMNS = 4 / ROWS;
  const int lanes = 1 << lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t groups = kThreads >> lanes_log2;
  const int64_t group = blockIdx.x * groups + (threadIdx.x >> lanes_log2);

  for (int64_t first = group * ROWS; first < rows; first += gridDim.x * groups * ROWS) {
    const W* source[ROWS];
    const W* addend[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      RowSource<T> found;
      if (first + r < rows) {
        found = find.template source<T>(first + r);
      }
      source[r] = reinterpret_cast<const W*>(found.row);
      addend[r] = reinterpret_cast<const W*>(found.addend);
    }
    W* const target = reinterpret_cast<W*>(out) + first * vectors;
    for (int start = lane; start < vectors; start += lanes * COLUMNS) {
      W words[ROWS][COLUMNS];
      W addends[ROWS][COLUMNS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const int v = start + c * lanes;
          words[r][c] = source[r] != nullptr && v < vectors ? __ldg(source[r] + v) : W{};
          if constexpr (ADDS) {
            addends[r][c] = addend[r] != nullptr && v < vectors ? __ldg(addend[r] + v) : W{};
          }
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const int v = start + c * lanes;
          if (first + r >= rows || v >= vectors) {
            continue;
          }
          if constexpr (ADDS) {
            if (addend[r] != nullptr) {
              float sums[VEC] = {};
              accumulate<T, VEC>(sums, words[r][c]);
              accumulate<T, VEC>(sums, addends[r][c]);
              words[r][c] = pack<T, VEC>(sums);
            }
          }
          target[static_cast<int64_t>(r) * vectors + v] = words[r][c];
        }
      }
    }
  }
}

template <typename T, int VEC, bool ADDS, typename Find>
cudaError_t write_rows_of(const Find& find, void* out, int64_t rows, int64_t dim,
                          cudaStream_t stream) {
  const int vectors = static_cast<int>(dim / VEC);
  const int log2 = lanes_log2(vectors);
  const int64_t groups = kThreads >> log2;
  // Four rows per warp only where they still fill a large device: about 132 SMs of 16 warps.
  constexpr int kRows = 4;
  if (rows >= kRows * 16 * 132) {
    return launch(write_rows_kernel<T, VEC, kRows, ADDS, Find>, blocks_for(rows, groups * kRows),
                  kThreads, 0, stream, find, static_cast<T*>(out), rows, vectors, log2);
  }
  return launch(write_rows_kernel<T, VEC, 1, ADDS, Find>, blocks_for(rows, groups), kThreads, 0,
                stream, find, static_cast<T*>(out), rows, vectors, log2);
}

template <typename T, bool ADDS, typename Find>
cudaError_t write_rows_of(const Find& find, bool aligned, void* out, int64_t rows, int64_t dim,
                          cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  return aligned ? write_rows_of<T, kVec, ADDS>(find, out, rows, dim, stream)
                 : write_rows_of<T, 1, ADDS>(find, out, rows, dim, stream);
}

// out[row, :] for `rows` rows of `dim` elements, by find.source<T>(row), a __device__ function for
// every element type T. `adds`: whether it gives addends in this call; without, T is an unsigned
// integer of the size of dtype. Find::kMayAdd: whether it ever does. `aligned`: every row starts on
// 16 bytes and is a multiple of them long.
template <typename Find>
cudaError_t write_rows(const Find& find, DType dtype, bool adds, bool aligned, void* out,
                       int64_t rows, int64_t dim, cudaStream_t stream) {
  if (rows * dim == 0) {
    return cudaSuccess;
  }
  if (dim > std::numeric_limits<int>::max()) {
    return cudaErrorInvalidValue;
  }
  return with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (Find::kMayAdd) {
      if (adds) {
        return write_rows_of<T, true>(find, aligned, out, rows, dim, stream);
      }
    }
    using Bits = typename WordOf<sizeof(T)>::type;
    return write_rows_of<Bits, false>(find, aligned, out, rows, dim, stream);
  });
}

inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kUInt8 ? 1 : 2;
}

// Whether 16-byte accesses reach these rows of `dim` elements; rows that are not there are no
// hindrance.
inline bool rows_aligned(const Rows& rows, int64_t dim, DType dtype) {
  const int64_t size = element_size(dtype);
  return dim * size % 16 == 0 && rows_aligned(rows.data, rows.stride0, rows.stride1, size);
}

template <typename T>
__device__ __forceinline__ const T* row_at(const Rows& rows, int64_t i, int64_t j) {
  return static_cast<const T*>(rows.data) + i * rows.stride0 + j * rows.stride1;
}

constexpr int kWarps = kThreads / kWarp;

// Leaves in the block's shared memory, [VEC * 32], the sums over its warps of values, element e of
// lane l at e * 32 + l. All threads of the block; `shared` holds 8 times as many.
template <int VEC>
__device__ __forceinline__ void sum_warps(float* shared, const float (&values)[VEC]) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    shared[(warp * VEC + e) * kWarp + lane] = values[e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < VEC * kWarp; i += kThreads) {
    float sum = shared[i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      sum += shared[w * VEC * kWarp + i];
    }
    shared[i] = sum;
  }
  __syncthreads();
}

// Where thread i < VEC * 32 finds its column of a chunk of 32 vectors in what sum_warps leaves.
template <int VEC>
__device__ __forceinline__ int64_t column_of(int64_t chunk, int i) {
  return (chunk * kWarp + i / VEC) * VEC + i % VEC;
}
template <int VEC>
__device__ __forceinline__ int place_of(int i) {
  return i % VEC * kWarp + i / VEC;
}

}  // namespace mimkernels::cuda

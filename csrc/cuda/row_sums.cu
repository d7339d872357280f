#include "cuda/row_sums.h"

#include <limits>

#include "cuda/sums.cuh"

namespace mimkernels::cuda {
namespace {

// Blocks that fill a large device: the images are split into slices until there are as many. A
// constant, so that the order of a sum depends on the shape alone.
constexpr int64_t kBlocks = 512;
// Up to this many parts, one thread adds them all; up to the other, 8 threads, beyond it 32.
constexpr int64_t kFewParts = 32;
constexpr int64_t kManyParts = 512;

// How the sums are split: `slices` of the images, each summed by blocks of one row per warp.
struct SumTiling {
  int64_t row_blocks = 0;
  int64_t per_slice = 0;
  int64_t slices = 0;
  int64_t stored = 1;  // of each partial sum: itself, and if its result is fp32, what it has lost
};

SumTiling tiling_of(const RowSumsParams& p) {
  SumTiling tiling;
  tiling.row_blocks = ceil_div(p.rows, kWarps);
  const int64_t chunks = ceil_div(p.dim * element_size(p.dtype), 16 * kWarp);
  tiling.stored = p.dtype == DType::kFloat32 ? 2 : 1;
  if (p.images * p.rows * p.dim == 0) {
    return tiling;
  }
  const int64_t wanted = ceil_div(kBlocks, tiling.row_blocks * chunks);
  tiling.per_slice = ceil_div(p.images, wanted < p.images ? wanted : p.images);
  tiling.slices = ceil_div(p.images, tiling.per_slice);
  return tiling;
}

// grid:     (row blocks and chunks, slices) of 256 threads: a warp owns 32 vectors of one row of
//           one slice of the images; then loops
// in:       grad [A, R, D], mask bool [A, R] or ids int64 [A, R - first], by stride, last stride 1
// out:      dx [A, R, D]; all [1 or 2, slices, R, D] and masked [1 or 2, slices * row_blocks, D],
//           partial sums in fp32, then where T is float what they have lost; each unless null,
//           contiguous, every element written exactly once
// numerics: dx is a copy of the bits; sums in fp32, images ascending, then the 8 rows of a block,
//           where T is float compensated
// bounds:   the tails of rows and vectors are masked; ids outside [kept, R - first) are not masked;
//           offsets are int64
// cost:     the rows of grad that count read once, 4 independent loads in flight per thread; 16
//           KiB of shared memory for `masked`; no atomics, deterministic
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 3)
    row_sums_kernel(RowSumsParams p, float* all, float* masked, int64_t row_blocks,
                    int64_t per_slice, int vectors, int chunks) {
  using W = Word<T, VEC>;
  constexpr int kBatch = 4;
  float* const shared = reinterpret_cast<float*>(shared_memory());  // [2, 8, 32 * VEC]
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t slice = blockIdx.y;
  const int64_t first = slice * per_slice;
  const int64_t end = first + per_slice < p.images ? first + per_slice : p.images;

  for (int64_t item = blockIdx.x; item < row_blocks * chunks; item += gridDim.x) {
    int64_t chunk;
    const int64_t row_block = divide(item, chunks, chunk);
    const int64_t j = row_block * kWarps + warp;
    const int v = static_cast<int>(chunk) * kWarp + lane;
    const bool active = j < p.rows && v < vectors;
    RowSum<T> visible_sums[VEC] = {};
    RowSum<T> masked_sums[VEC] = {};
    for (int64_t b0 = first; b0 < end; b0 += kBatch) {
      bool is_masked[kBatch];
      W words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t b = b0 + i;
        is_masked[i] = false;
        if (active && b < end) {
          if (p.mask.given) {
            is_masked[i] = __ldg(p.mask.data + b * p.mask.stride0 + j) != 0;
          } else if (p.ids.given && j >= p.first) {
            const int64_t id = __ldg(p.ids.data + b * p.ids.stride1 + j - p.first);
            is_masked[i] = id >= p.kept && id < p.rows - p.first;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool wanted = all != nullptr || (is_masked[i] ? masked != nullptr : p.dx != nullptr);
        words[i] = W{};
        if (active && b0 + i < end && wanted) {
          words[i] = __ldg(reinterpret_cast<const W*>(row_at<T>(p.grad, b0 + i, j)) + v);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (p.dx != nullptr && active && b0 + i < end) {
          T* const row = static_cast<T*>(p.dx) + ((b0 + i) * p.rows + j) * p.dim;
          reinterpret_cast<W*>(row)[v] = is_masked[i] ? W{} : words[i];
        }
        if (is_masked[i]) {
          add_word<T, VEC>(masked_sums, words[i]);
        } else if (all != nullptr) {
          add_word<T, VEC>(visible_sums, words[i]);
        }
      }
    }
    if (all != nullptr && active) {
      float* const target = all + (slice * p.rows + j) * p.dim + int64_t{v} * VEC;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        visible_sums[e].add(masked_sums[e]);
        store_sum(target + e, std::is_same_v<T, float> ? gridDim.y * p.rows * p.dim : 0,
                  visible_sums[e]);
      }
    }
    if (masked != nullptr) {
      sum_warps<VEC>(shared, masked_sums);
      float* const target = masked + (slice * row_blocks + row_block) * p.dim;
      for (int i = threadIdx.x; i < VEC * kWarp; i += kThreads) {
        const int64_t column = column_of<VEC>(chunk, i);
        if (column < p.dim) {
          store_sum(target + column, std::is_same_v<T, float> ? gridDim.y * row_blocks * p.dim : 0,
                    summed<VEC>(shared, place_of<VEC>(i)));
        }
      }
      __syncthreads();
    }
  }
}

// grid:     (elements, sums) in blocks of 256 threads; 2^groups_log2 threads share an element, then
//           loop
// in:       each sum's partial fp32 [parts, elements]
// out:      [elements] of each sum; every element written exactly once
// numerics: fp32 sums of the parts group, group + groups, ..., then of the groups, compensated;
//           rounded once
// bounds:   the tail is masked; offsets are int64
// cost:     partial read once, 4 independent loads in flight per thread; 2 KiB of shared memory; no
//           atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(PartialSums sums, int64_t parts, int64_t elements, int groups_log2) {
  float* const shared = reinterpret_cast<float*>(shared_memory());  // [2, groups, columns]
  // Constant indices, so that the parameters stay where they are.
  const int which = static_cast<int>(blockIdx.y);
  const float* const partial = which == 0   ? sums.partial[0]
                               : which == 1 ? sums.partial[1]
                                            : sums.partial[2];
  T* const out = static_cast<T*>(which == 0 ? sums.out[0] : which == 1 ? sums.out[1] : sums.out[2]);
  const int groups = 1 << groups_log2;
  const int columns = kThreads >> groups_log2;
  const int column = threadIdx.x & (columns - 1);
  const int group = threadIdx.x / columns;
  for (int64_t first = blockIdx.x * int64_t{columns}; first < elements;
       first += gridDim.x * int64_t{columns}) {
    const int64_t i = first + column;
    CompensatedSum sum;
    if (i < elements) {
#pragma unroll 4
      for (int64_t part = group; part < parts; part += groups) {
        sum.add(__ldg(partial + part * elements + i));
      }
    }
    shared[threadIdx.x] = sum.sum;
    shared[kThreads + threadIdx.x] = sum.lost;
    __syncthreads();
    if (group == 0 && i < elements) {
      for (int g = 1; g < groups; ++g) {
        sum.add({shared[g * columns + column], shared[kThreads + g * columns + column]});
      }
      out[i] = from_float<T>(sum.total());
    }
    __syncthreads();
  }
}

template <typename T, int VEC>
cudaError_t sum_slices(const RowSumsParams& p, const SumTiling& tiling, float* all, float* masked,
                       cudaStream_t stream) {
  const int vectors = static_cast<int>(p.dim / VEC);
  const int chunks = static_cast<int>(ceil_div(vectors, kWarp));
  const dim3 blocks(blocks_for(tiling.row_blocks * chunks, 1),
                    static_cast<unsigned>(tiling.slices));
  const int shared = masked == nullptr ? 0 : sum_warps_bytes(VEC);
  return launch(row_sums_kernel<T, VEC>, blocks, kThreads, shared, stream, p, all, masked,
                tiling.row_blocks, tiling.per_slice, vectors, chunks);
}

}  // namespace

cudaError_t sum_partials(DType dtype, const PartialSums& sums, int64_t parts, int64_t elements,
                         cudaStream_t stream) {
  if (elements == 0 || sums.count == 0) {
    return cudaSuccess;
  }
  const int groups_log2 = parts <= kFewParts ? 0 : parts <= kManyParts ? 3 : 5;
  const dim3 blocks(blocks_for(elements, kThreads >> groups_log2),
                    static_cast<unsigned>(sums.count));
  return with_float_type(dtype, [&](auto type) {
    return launch(sum_partials_kernel<decltype(type)>, blocks, kThreads,
                  2 * kThreads * static_cast<int>(sizeof(float)), stream, sums, parts, elements,
                  groups_log2);
  });
}

cudaError_t sum_partials(DType dtype, const float* partial, int64_t parts, int64_t elements,
                         void* out, cudaStream_t stream) {
  PartialSums sums;
  sums.add(partial, out);
  return sum_partials(dtype, sums, parts, elements, stream);
}

int64_t row_sums_workspace(const RowSumsParams& p) {
  const SumTiling tiling = tiling_of(p);
  const int64_t rows =
      (p.dall != nullptr ? p.rows : 0) + (p.dmasked != nullptr ? tiling.row_blocks : 0);
  return tiling.stored * tiling.slices * rows * p.dim;
}

cudaError_t row_sums(const RowSumsParams& p, float* workspace, cudaStream_t stream) {
  if (p.dim > std::numeric_limits<int>::max()) {
    return cudaErrorInvalidValue;
  }
  if (p.dx == nullptr && p.dmasked == nullptr && p.dall == nullptr) {
    return cudaSuccess;
  }
  const SumTiling tiling = tiling_of(p);
  const int64_t parts = tiling.stored * tiling.slices;
  float* const all = p.dall == nullptr ? nullptr : workspace;
  float* const masked =
      p.dmasked == nullptr ? nullptr : workspace + (all == nullptr ? 0 : parts * p.rows * p.dim);
  if (tiling.slices > 0) {
    const cudaError_t error = with_float_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      const bool aligned =
          rows_aligned(p.grad, p.dim, p.dtype) && rows_aligned({p.dx, 0, 0}, p.dim, p.dtype);
      return aligned ? sum_slices<T, 16 / sizeof(T)>(p, tiling, all, masked, stream)
                     : sum_slices<T, 1>(p, tiling, all, masked, stream);
    });
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (p.dall != nullptr) {
    const cudaError_t error = sum_partials(p.dtype, all, parts, p.rows * p.dim, p.dall, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (p.dmasked == nullptr) {
    return cudaSuccess;
  }
  return sum_partials(p.dtype, masked, parts * tiling.row_blocks, p.dim, p.dmasked, stream);
}

}  // namespace mimkernels::cuda

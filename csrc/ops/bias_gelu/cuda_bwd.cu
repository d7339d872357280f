#include "cuda/row_sums.h"
#include "cuda/sums.cuh"
#include "ops/bias_gelu/cuda.cuh"
#include "ops/bias_gelu/cuda.h"

namespace mimkernels::cuda {
namespace {

bool words_fit(const BiasGeluBwdParams& p) {
  return rows_aligned(p.grad, p.dim, p.dtype) && rows_aligned(p.x, p.dim, p.dtype) &&
         rows_aligned({p.dx, 0, 0}, p.dim, p.dtype) &&
         rows_aligned({p.bias, 0, 0}, p.dim, p.bias_dtype);
}

GeluTiling tiling_of(const BiasGeluBwdParams& p) {
  const int vec = words_fit(p) ? static_cast<int>(16 / element_size(p.dtype)) : 1;
  return gelu_tiling(p.batch * p.tokens, p.dim, vec);
}

// grid:     blocks of 256 threads; a block owns 32 words of the columns of a slice of the rows, its
//           warps every eighth batch of 4 rows; then loops
// in:       grad and x [A, R, E] by stride, last stride 1; bias [E] in x's type, fp32 or absent
// out:      dx [A, R, E] or none; partial fp32 [2, slices, E] or none, the sums of dx over the rows
//           of each slice, then what they have lost; contiguous, every element written exactly once
// numerics: fp32, dx rounded once; each warp's rows are added in order, then the warps, compensated
// bounds:   the tails of rows and words are masked; offsets are int64
// cost:     grad and x read once, dx written once; 8 independent loads in flight per thread; 2 KiB
//           of shared memory per element of a word; no atomics, deterministic
template <typename T, int VEC, bool TANH>
__global__ void __launch_bounds__(kThreads, 2)
    bias_gelu_bwd_kernel(BiasGeluBwdParams p, GeluRows given, GeluRows upstream, GeluTiling tiling,
                         float* partial) {
  using W = Word<T, VEC>;
  float* const shared = reinterpret_cast<float*>(shared_memory());  // [2, 8, VEC, 32]
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t rows = p.batch * p.tokens;
  const bool fp32_bias = p.bias_dtype == DType::kFloat32;
  for (int64_t item = blockIdx.x; item < tiling.chunks * tiling.slices; item += gridDim.x) {
    int64_t chunk;
    const int64_t slice = divide(item, tiling.chunks, chunk);
    const int64_t word = chunk * kWarp + lane;
    const bool active = word < tiling.words;
    float bias[VEC] = {};
    if (active) {
      load_bias<T, VEC>(bias, p.has_bias, p.bias, fp32_bias, word * VEC);
    }
    CompensatedSum sums[VEC] = {};
    const int64_t end = active ? min(rows, (slice + 1) * tiling.per_slice) : 0;
    for (int64_t i = slice * tiling.per_slice + warp * kRowsAtOnce; i < end;
         i += kWarps * kRowsAtOnce) {
      W words[kRowsAtOnce];
      W grads[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        words[r] = W{};
        grads[r] = W{};
        if (i + r < end) {
          words[r] = __ldg(reinterpret_cast<const W*>(given.at<T>(i + r)) + word);
          grads[r] = __ldg(reinterpret_cast<const W*>(upstream.at<T>(i + r)) + word);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (i + r >= end) {
          continue;
        }
        float x[VEC];
        float dx[VEC] = {};
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          x[e] = bias[e];
        }
        accumulate<T, VEC>(x, words[r]);
        accumulate<T, VEC>(dx, grads[r]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          const float slope = gelu_tail<TANH>(x[e]).slope;
          dx[e] *= x[e] < 0.0f ? slope : 1.0f - slope;
          sums[e].add(dx[e]);
        }
        if (p.dx != nullptr) {
          reinterpret_cast<W*>(static_cast<T*>(p.dx) + (i + r) * p.dim)[word] = pack<T, VEC>(dx);
        }
      }
    }
    if (partial != nullptr) {
      sum_warps<VEC>(shared, sums);
      for (int i = threadIdx.x; i < VEC * kWarp; i += kThreads) {
        const int64_t column = column_of<VEC>(chunk, i);
        if (column < p.dim) {
          store_sum(partial + slice * p.dim + column, tiling.slices * p.dim,
                    summed<VEC>(shared, place_of<VEC>(i)));
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace

int64_t bias_gelu_bwd_workspace(const BiasGeluBwdParams& p) {
  return p.dbias == nullptr ? 0 : 2 * tiling_of(p).slices * p.dim;
}

cudaError_t bias_gelu_bwd(const BiasGeluBwdParams& p, float* workspace, cudaStream_t stream) {
  const GeluTiling tiling = tiling_of(p);
  float* const partial = p.dbias == nullptr ? nullptr : workspace;
  if (tiling.slices > 0 && (p.dx != nullptr || partial != nullptr)) {
    const cudaError_t error =
        with_gelu_kind(p.dtype, words_fit(p), p.tanh, [&](auto type, auto vec, auto tanh) {
          constexpr int kVec = decltype(vec)::value;
          return launch(bias_gelu_bwd_kernel<decltype(type), kVec, decltype(tanh)::value>,
                        blocks_for(tiling.chunks * tiling.slices, 1), kThreads,
                        sum_warps_bytes(kVec), stream, p, GeluRows(p.x, p.batch, p.tokens),
                        GeluRows(p.grad, p.batch, p.tokens), tiling, partial);
        });
    if (error != cudaSuccess) {
      return error;
    }
  }
  return p.dbias == nullptr
             ? cudaSuccess
             : sum_partials(p.bias_dtype, partial, 2 * tiling.slices, p.dim, p.dbias, stream);
}

}  // namespace mimkernels::cuda

#include "ops/bias_gelu/cuda.cuh"
#include "ops/bias_gelu/cuda.h"

namespace mimkernels::cuda {
namespace {

// grid:     blocks of 256 threads; a block owns 32 words of the columns of a slice of the rows, its
//           warps every eighth batch of 4 rows; then loops
// in:       x [A, R, E] by stride, last stride 1; bias [E] in x's type, fp32 or absent
// out:      [A, R, E] contiguous; every element written exactly once
// numerics: added and evaluated in fp32, rounded once
// bounds:   the tails of rows and words are masked; offsets are int64
// cost:     x read once, out written once, the bias once per block and warp; 4 independent loads in
//           flight per thread; no shared memory, no atomics, deterministic
template <typename T, int VEC, bool TANH>
__global__ void __launch_bounds__(kThreads, 3)
    bias_gelu_fwd_kernel(BiasGeluFwdParams p, GeluRows given, GeluTiling tiling) {
  using W = Word<T, VEC>;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t rows = p.batch * p.tokens;
  const bool fp32_bias = p.bias_dtype == DType::kFloat32;
  for (int64_t item = blockIdx.x; item < tiling.chunks * tiling.slices; item += gridDim.x) {
    int64_t chunk;
    const int64_t slice = divide(item, tiling.chunks, chunk);
    const int64_t word = chunk * kWarp + lane;
    if (word >= tiling.words) {
      continue;
    }
    float bias[VEC];
    load_bias<T, VEC>(bias, p.has_bias, p.bias, fp32_bias, word * VEC);
    const int64_t end = min(rows, (slice + 1) * tiling.per_slice);
    for (int64_t i = slice * tiling.per_slice + warp * kRowsAtOnce; i < end;
         i += kWarps * kRowsAtOnce) {
      W words[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        words[r] = W{};
        if (i + r < end) {
          words[r] = __ldg(reinterpret_cast<const W*>(given.at<T>(i + r)) + word);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        float x[VEC];
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          x[e] = bias[e];
        }
        accumulate<T, VEC>(x, words[r]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          x[e] = gelu<T, TANH>(x[e]);
        }
        if (i + r < end) {
          reinterpret_cast<W*>(static_cast<T*>(p.out) + (i + r) * p.dim)[word] = pack<T, VEC>(x);
        }
      }
    }
  }
}

}  // namespace

cudaError_t bias_gelu_fwd(const BiasGeluFwdParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.tokens;
  if (rows * p.dim == 0) {
    return cudaSuccess;
  }
  const bool aligned = rows_aligned(p.x, p.dim, p.dtype) &&
                       rows_aligned({p.out, 0, 0}, p.dim, p.dtype) &&
                       rows_aligned({p.bias, 0, 0}, p.dim, p.bias_dtype);
  return with_gelu_kind(p.dtype, aligned, p.tanh, [&](auto type, auto vec, auto tanh) {
    const GeluTiling tiling = gelu_tiling(rows, p.dim, vec);
    return launch(bias_gelu_fwd_kernel<decltype(type), decltype(vec)::value, decltype(tanh)::value>,
                  blocks_for(tiling.chunks * tiling.slices, 1), kThreads, 0, stream, p,
                  GeluRows(p.x, p.batch, p.tokens), tiling);
  });
}

}  // namespace mimkernels::cuda

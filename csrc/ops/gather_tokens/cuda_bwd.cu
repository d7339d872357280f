#include <limits>

#include "cuda/matches.cuh"
#include "cuda/row_sums.h"
#include "cuda/scatter_rows.h"
#include "cuda/sums.cuh"
#include "ops/gather_tokens/cuda.h"

namespace mimkernels::cuda {
namespace {

// Warps that fill a large device: the batch is split into slices until there are as many. A constant,
// so that the order of a sum depends on the shape alone.
constexpr int64_t kWarpsWanted = 4096;

int64_t slices_of(const GatherTokensBwdParams& p) {
  if (p.dpos == nullptr || p.batch * p.tokens * p.dim == 0) {
    return 0;
  }
  const int64_t chunks = ceil_div(p.dim * element_size(p.dtype), 16 * kWarp);
  const int64_t wanted = ceil_div(kWarpsWanted, p.tokens * chunks);
  return wanted < p.batch ? wanted : p.batch;
}

// With what the sums of the slices have lost.
int64_t parts_of(const GatherTokensBwdParams& p) {
  return (p.dtype == DType::kFloat32 ? 2 : 1) * slices_of(p);
}

// grid:     blocks of 256 threads; a warp owns 32 vectors of one row of one slice's partial sums,
//           then loops
// in:       grad [M * B, P + K, D] by stride, last stride 1; ids int64 [M, B, K] by stride
// out:      partial fp32 [1 or 2, slices, N, D], each summed over the images b = slice, slice +
//           slices, ..., then where T is float what the sums have lost
// numerics: fp32 sums in the order of b, then m, then k, where T is float compensated
// bounds:   the tail of a row is masked; an id outside [0, N) matches no row; offsets are int64
// cost:     grad read once, partial written once; the ids of an image, M * K, are searched per 32
//           vectors of a row by the whole warp, from L1; no atomics, deterministic
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    gather_tokens_dpos_kernel(GatherTokensBwdParams p, float* partial, int64_t slices, int vectors,
                              int chunks) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int64_t items = slices * p.tokens * chunks;
  for (int64_t item = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp; item < items;
       item += warps) {
    int64_t chunk, n;
    const int64_t slice = divide(divide(item, chunks, chunk), p.tokens, n);
    const int v = static_cast<int>(chunk) * kWarp + lane;
    RowSum<T> sums[VEC] = {};
    for (int64_t b = slice; b < p.batch; b += slices) {
      for_each_match(p.ids, p.masks, p.kept, b, n, [&](int64_t m, int64_t k) {
        if (v < vectors) {
          const T* const row = row_at<T>(p.grad, m * p.batch + b, p.num_prefix + k);
          add_word<T, VEC>(sums, __ldg(reinterpret_cast<const Word<T, VEC>*>(row) + v));
        }
      });
    }
    if (v < vectors) {
      float* const target = partial + (slice * p.tokens + n) * p.dim + int64_t{v} * VEC;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        store_sum(target + e, std::is_same_v<T, float> ? slices * p.tokens * p.dim : 0, sums[e]);
      }
    }
  }
}

template <typename T, int VEC>
cudaError_t sum_slices(const GatherTokensBwdParams& p, float* partial, int64_t slices,
                       cudaStream_t stream) {
  const int vectors = static_cast<int>(p.dim / VEC);
  const int chunks = static_cast<int>(ceil_div(vectors, kWarp));
  return launch(gather_tokens_dpos_kernel<T, VEC>,
                blocks_for(slices * p.tokens * chunks, kThreads / kWarp), kThreads, 0, stream, p,
                partial, slices, vectors, chunks);
}

cudaError_t gather_tokens_dx(const GatherTokensBwdParams& p, cudaStream_t stream) {
  ScatterRowsParams scatter;
  scatter.grad_dtype = p.dtype;
  scatter.out_dtype = p.dtype;
  scatter.masks = p.masks;
  scatter.batch = p.batch;
  scatter.kept = p.kept;
  scatter.num_prefix = p.num_prefix;
  scatter.grad = p.grad;
  scatter.ids = p.ids;
  scatter.grid = {p.batch, 1, 1, p.tokens, p.dim, 1, 1, p.dim};
  scatter.out = p.dx;
  return scatter_rows(scatter, stream);
}

cudaError_t gather_tokens_dpos(const GatherTokensBwdParams& p, float* workspace,
                               cudaStream_t stream) {
  const int64_t slices = slices_of(p);
  if (slices > 0) {
    const cudaError_t error = with_float_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      return rows_aligned(p.grad, p.dim, p.dtype)
                 ? sum_slices<T, 16 / sizeof(T)>(p, workspace, slices, stream)
                 : sum_slices<T, 1>(p, workspace, slices, stream);
    });
    if (error != cudaSuccess) {
      return error;
    }
  }
  return sum_partials(p.dtype, workspace, parts_of(p), p.tokens * p.dim, p.dpos, stream);
}

RowSumsParams prefix_sums_of(const GatherTokensBwdParams& p) {
  RowSumsParams sums;
  sums.dtype = p.dtype;
  sums.images = p.masks * p.batch;
  sums.rows = p.num_prefix;
  sums.dim = p.dim;
  sums.grad = p.grad;
  sums.dall = p.dprefix;
  return sums;
}

}  // namespace

int64_t gather_tokens_bwd_workspace(const GatherTokensBwdParams& p) {
  return parts_of(p) * p.tokens * p.dim + row_sums_workspace(prefix_sums_of(p));
}

cudaError_t gather_tokens_bwd(const GatherTokensBwdParams& p, float* workspace,
                              cudaStream_t stream) {
  if (p.dim > std::numeric_limits<int>::max()) {
    return cudaErrorInvalidValue;
  }
  if (p.dx != nullptr) {
    const cudaError_t error = gather_tokens_dx(p, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (p.dpos != nullptr) {
    const cudaError_t error = gather_tokens_dpos(p, workspace, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return row_sums(prefix_sums_of(p), workspace + parts_of(p) * p.tokens * p.dim, stream);
}

}  // namespace mimkernels::cuda

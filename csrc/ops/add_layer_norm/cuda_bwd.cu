#include "cuda/row_sums.h"
#include "cuda/sums.cuh"
#include "ops/add_layer_norm/cuda.cuh"
#include "ops/add_layer_norm/cuda.h"

namespace mimkernels::cuda {
namespace {

// A block takes whole rows up to so many words; longer rows, and those of unusual types or
// alignment, are split among blocks, and their sums taken beforehand.
constexpr int kWholeRowWords = 512;
// Threads that keep a large device busy: the rows are split into slices until there are as many, of
// no fewer rows than kLeastRows. Constants, so that the order of a sum depends on the shape alone.
constexpr int64_t kThreadsWanted = int64_t{3} << 15;
constexpr int64_t kLeastRows = 8;

// Items of work: `threads` words of the columns of a slice of the rows.
struct NormTiling {
  int vec = 1;         // elements of a word
  bool split = true;   // whether several blocks may share a row
  int threads = 0;     // of a block
  int64_t words = 0;   // of a row
  int64_t chunks = 0;  // of a row: blocks that share it
  int64_t slices = 0;  // of the rows
  int64_t per_slice = 0;
};

// The branch's and the normalised rows' types are of no account where neither is read or written.
AnyTypes types_of(const AddLayerNormBwdParams& p) {
  const bool has_y = p.dy != nullptr || p.dscale != nullptr;
  const DType out = p.grad_out.given ? p.out_dtype : has_y ? p.y_dtype : p.residual_dtype;
  return {p.residual_dtype, has_y ? p.y_dtype : out, out};
}

int vec_of(const AddLayerNormBwdParams& p) {
  constexpr int kVec = 4;
  const bool fit = words_fit(p.grad_residual, p.dim, p.residual_dtype, kVec) &&
                   words_fit(p.grad_out, p.dim, p.out_dtype, kVec) &&
                   words_fit(p.residual, p.dim, p.residual_dtype, kVec) &&
                   words_fit(p.y, p.dim, p.y_dtype, kVec) &&
                   words_fit({p.scale, 0, 0}, p.dim, DType::kFloat32, kVec) &&
                   words_fit({p.weight, 0, 0}, p.dim, DType::kFloat32, kVec) &&
                   words_fit({p.dx, 0, 0}, p.dim, p.residual_dtype, kVec) &&
                   words_fit({p.dy, 0, 0}, p.dim, p.y_dtype, kVec);
  return fit ? kVec : 1;
}

NormTiling tiling_of(const AddLayerNormBwdParams& p) {
  NormTiling tiling;
  tiling.vec = vec_of(p);
  tiling.words = p.dim / tiling.vec;
  cudaError_t error = cudaSuccess;
  tiling.split = tiling.vec == 1 || tiling.words > kWholeRowWords ||
                 !with_fixed_types(types_of(p), error, [](auto) { return cudaSuccess; });
  const int64_t rows = p.batch * p.tokens;
  if (rows * p.dim == 0) {
    return tiling;
  }
  tiling.chunks = tiling.split ? ceil_div(tiling.words, kThreads) : 1;
  tiling.threads = static_cast<int>(ceil_div(ceil_div(tiling.words, tiling.chunks), kWarp)) * kWarp;
  const int64_t length = ceil_div(rows, ceil_div(kThreadsWanted, tiling.threads * tiling.chunks));
  tiling.per_slice = length < kLeastRows ? kLeastRows : length;
  tiling.slices = ceil_div(rows, tiling.per_slice);
  return tiling;
}

// The two sums over a row that its gradient needs: of g = grad_out * weight, and of g times the
// normalised values.
struct RowProducts {
  float plain = 0.0f;
  float projected = 0.0f;

  __device__ __forceinline__ void add(float g, float value) {
    plain += g;
    projected += g * value;
  }
};

// grid:     a warp owns one row, then loops
// in:       grad_out and residual [A, R, C] by stride, last stride 1; weight fp32 [C] or absent;
//           mean and rstd fp32 [A, R]
// out:      products fp32 [A, R, 2]: sums over each row; every element written exactly once
// numerics: fp32, chains of C / 32 terms, then by a tree
// bounds:   the tail of a row is masked; offsets are int64
// cost:     grad_out and residual read once; no shared memory, no atomics, deterministic
template <int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    add_layer_norm_products_kernel(AddLayerNormBwdParams p, float* products) {
  const int lane = threadIdx.x % kWarp;
  const int64_t words = p.dim / VEC;
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; i < p.batch * p.tokens;
       i += gridDim.x * int64_t{kWarps}) {
    int64_t token;
    const int64_t image = divide(i, p.tokens, token);
    const void* const grads = row_of(p.grad_out, p.out_dtype, image, token);
    const void* const residual = row_of(p.residual, p.residual_dtype, image, token);
    const float mean = __ldg(p.mean + i);
    const float rstd = __ldg(p.rstd + i);
    RowProducts sums;
    for (int64_t word = lane; word < words; word += kWarp) {
      RawWord<VEC> raw_grad;
      RawWord<VEC> raw_residual;
      load_raw<VEC>(raw_grad, grads, p.out_dtype, word);
      load_raw<VEC>(raw_residual, residual, p.residual_dtype, word);
      float grad[VEC];
      float values[VEC];
      float weight[VEC];
      widen<VEC>(grad, raw_grad, p.out_dtype);
      widen<VEC>(values, raw_residual, p.residual_dtype);
      load_parameter<VEC>(weight, p.has_weight, p.weight, word, 1.0f);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        sums.add(grad[e] * weight[e], (values[e] - mean) * rstd);
      }
    }
    const float plain = warp_sum(sums.plain);
    const float projected = warp_sum(sums.projected);
    if (lane == 0) {
      products[2 * i] = plain;
      products[2 * i + 1] = projected;
    }
  }
}

// Sums over the block's threads of the products of ROWS rows, in every thread. Batches of rows use
// two places in shared memory, [2, warps, ROWS, 2], by turns, so that one barrier each is enough.
template <int ROWS>
__device__ __forceinline__ void sum_products(RowProducts (&sums)[ROWS], int turn) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  float* const shared = reinterpret_cast<float*>(shared_memory()) + turn * warps * ROWS * 2;
  float* const own = shared + threadIdx.x / kWarp * ROWS * 2;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = {warp_sum(sums[r].plain), warp_sum(sums[r].projected)};
    if (threadIdx.x % kWarp == 0) {
      own[2 * r] = sums[r].plain;
      own[2 * r + 1] = sums[r].projected;
    }
    sums[r] = {};
  }
  __syncthreads();
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[r].plain += shared[(w * ROWS + r) * 2];
      sums[r].projected += shared[(w * ROWS + r) * 2 + 1];
    }
  }
}

template <int ROWS>
constexpr int shared_bytes(int threads) {
  return 2 * threads / kWarp * ROWS * 2 * static_cast<int>(sizeof(float));
}

// What the block stores for dweight, dbias and dscale: fp32 [2, slices, C] each, the sums over the
// rows of each slice, then what they have lost; null where not wanted.
struct Partials {
  float* weight = nullptr;
  float* bias = nullptr;
  float* scale = nullptr;
};

template <int VEC>
__device__ __forceinline__ void store_sums(float* partial, const CompensatedSum (&sums)[VEC],
                                           int64_t slice, int64_t slices, int64_t dim,
                                           int64_t word) {
  if (partial != nullptr) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      store_sum(partial + slice * dim + word * VEC + e, slices * dim, sums[e]);
    }
  }
}

// grid:     blocks of up to 512 threads; a block owns a slice of the rows, a thread one word of
//           their columns, then loops; where SPLIT several blocks share the columns
// in:       grad_residual, grad_out, residual, y [A, R, C] by stride, last stride 1; scale, weight
//           fp32 [C], drop fp32 [A]; all but residual may be absent; mean and rstd fp32 [A, R];
//           products fp32 [A, R, 2], read where SPLIT
// out:      dx, dy [A, R, C] or none; partials fp32 or none; contiguous, every element written
//           exactly once
// numerics: fp32, dx and dy rounded once; sums over a row by a tree, then its warps in order; sums
//           over rows in order, compensated
// bounds:   the tails of rows and words are masked; offsets are int64
// cost:     every input read once (SPLIT: grad_out and residual a second time), dx and dy written
//           once; 4 * ROWS independent loads in flight per thread, one barrier per ROWS rows (SPLIT:
//           none); at most 512 bytes of shared memory; no atomics, deterministic
template <typename Types, int VEC, int ROWS, bool SPLIT>
__global__ void __launch_bounds__(kWholeRowWords)
    add_layer_norm_bwd_kernel(AddLayerNormBwdParams p, Types types, NormTiling tiling,
                              const float* products, Partials partials) {
  const int64_t rows = p.batch * p.tokens;
  const float dim = static_cast<float>(p.dim);
  for (int64_t item = blockIdx.x; item < tiling.chunks * tiling.slices; item += gridDim.x) {
    int64_t chunk;
    const int64_t slice = divide(item, tiling.chunks, chunk);
    const int64_t word = chunk * blockDim.x + threadIdx.x;
    const bool active = word < tiling.words;
    float weight[VEC] = {};
    float scale[VEC] = {};
    if (active) {
      load_parameter<VEC>(weight, p.has_weight, p.weight, word, 1.0f);
      load_parameter<VEC>(scale, p.has_scale, p.scale, word, 1.0f);
    }
    CompensatedSum dweight[VEC] = {};
    CompensatedSum dbias[VEC] = {};
    CompensatedSum dscale[VEC] = {};
    const int64_t end = min(rows, (slice + 1) * tiling.per_slice);
    int turn = 0;
    for (int64_t i = slice * tiling.per_slice; i < end; i += ROWS, turn ^= 1) {
      RawWord<VEC> raw_residual[ROWS] = {};
      RawWord<VEC> raw_grad[ROWS] = {};
      RawWord<VEC> raw_dx[ROWS] = {};
      RawWord<VEC> raw_y[ROWS] = {};
      float mean[ROWS] = {};
      float rstd[ROWS] = {};
      float factor[ROWS] = {};
      RowProducts sums[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (i + r >= end || !active) {
          continue;
        }
        int64_t token;
        const int64_t image = divide(i + r, p.tokens, token);
        load_raw<VEC>(raw_residual[r], row_of(p.residual, types.x, image, token), types.x, word);
        if (p.grad_out.given) {
          load_raw<VEC>(raw_grad[r], row_of(p.grad_out, types.out, image, token), types.out, word);
          if constexpr (SPLIT) {
            sums[r] = {__ldg(products + 2 * (i + r)), __ldg(products + 2 * (i + r) + 1)};
          }
        }
        if (p.grad_residual.given) {
          load_raw<VEC>(raw_dx[r], row_of(p.grad_residual, types.x, image, token), types.x, word);
        }
        if (partials.scale != nullptr) {
          load_raw<VEC>(raw_y[r], row_of(p.y, types.y, image, token), types.y, word);
        }
        mean[r] = __ldg(p.mean + i + r);
        rstd[r] = __ldg(p.rstd + i + r);
        factor[r] = p.has_drop ? __ldg(p.drop + image) : 1.0f;
      }
      float values[ROWS][VEC];
      float grad[ROWS][VEC];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        widen<VEC>(values[r], raw_residual[r], types.x);
        widen<VEC>(grad[r], raw_grad[r], types.out);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          values[r][e] = (values[r][e] - mean[r]) * rstd[r];
          if constexpr (!SPLIT) {
            sums[r].add(grad[r][e] * weight[e], values[r][e]);
          }
        }
      }
      if constexpr (!SPLIT) {
        sum_products<ROWS>(sums, turn);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (i + r >= end || !active) {
          continue;
        }
        const float plain = sums[r].plain / dim;
        const float projected = sums[r].projected / dim;
        float dx[VEC];
        float dy[VEC];
        float y[VEC];
        widen<VEC>(dx, raw_dx[r], types.x);
        widen<VEC>(y, raw_y[r], types.y);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          if (p.grad_out.given) {
            dx[e] += rstd[r] * (grad[r][e] * weight[e] - plain - values[r][e] * projected);
            dweight[e].add(grad[r][e] * values[r][e]);
            dbias[e].add(grad[r][e]);
          }
          dy[e] = factor[r] * dx[e];
          dscale[e].add(dy[e] * y[e]);
          dy[e] *= scale[e];
        }
        if (p.dx != nullptr) {
          store_word<VEC>(row_of(p.dx, types.x, i + r, p.dim), types.x, word, dx);
        }
        if (p.dy != nullptr) {
          store_word<VEC>(row_of(p.dy, types.y, i + r, p.dim), types.y, word, dy);
        }
      }
    }
    if (active) {
      store_sums<VEC>(partials.weight, dweight, slice, tiling.slices, p.dim, word);
      store_sums<VEC>(partials.bias, dbias, slice, tiling.slices, p.dim, word);
      store_sums<VEC>(partials.scale, dscale, slice, tiling.slices, p.dim, word);
    }
    if constexpr (!SPLIT) {
      __syncthreads();
    }
  }
}

int64_t parameters_of(const AddLayerNormBwdParams& p) {
  return (p.dweight != nullptr) + (p.dbias != nullptr) + (p.dscale != nullptr);
}

int64_t products_of(const AddLayerNormBwdParams& p, const NormTiling& tiling) {
  return tiling.split && p.grad_out.given ? 2 * p.batch * p.tokens : 0;
}

// Longer rows, other types: two passes.
template <int VEC>
cudaError_t split_bwd(const AddLayerNormBwdParams& p, const NormTiling& tiling, float* products,
                      const Partials& partials, cudaStream_t stream) {
  if (p.grad_out.given) {
    const cudaError_t error =
        launch(add_layer_norm_products_kernel<VEC>, blocks_for(p.batch * p.tokens, kWarps),
               kThreads, 0, stream, p, products);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch(add_layer_norm_bwd_kernel<AnyTypes, VEC, 2, true>,
                blocks_for(tiling.chunks * tiling.slices, 1), tiling.threads, 0, stream, p,
                types_of(p), tiling, products, partials);
}

cudaError_t rows_bwd(const AddLayerNormBwdParams& p, const NormTiling& tiling, float* products,
                     const Partials& partials, cudaStream_t stream) {
  if (tiling.split) {
    return tiling.vec == 1 ? split_bwd<1>(p, tiling, products, partials, stream)
                           : split_bwd<4>(p, tiling, products, partials, stream);
  }
  cudaError_t error = cudaSuccess;
  with_fixed_types(types_of(p), error, [&](auto types) {
    using Types = decltype(types);
    constexpr int kRows = 2;  // more spill
    return launch(add_layer_norm_bwd_kernel<Types, 4, kRows, false>, blocks_for(tiling.slices, 1),
                  tiling.threads, shared_bytes<kRows>(tiling.threads), stream, p, types, tiling,
                  nullptr, partials);
  });
  return error;
}

}  // namespace

int64_t add_layer_norm_bwd_workspace(const AddLayerNormBwdParams& p) {
  const NormTiling tiling = tiling_of(p);
  return products_of(p, tiling) + parameters_of(p) * 2 * tiling.slices * p.dim;
}

cudaError_t add_layer_norm_bwd(const AddLayerNormBwdParams& p, float* workspace,
                               cudaStream_t stream) {
  const NormTiling tiling = tiling_of(p);
  float* next = workspace + products_of(p, tiling);
  PartialSums sums;
  const auto take = [&](float* out) {
    float* const partial = out == nullptr ? nullptr : next;
    if (out != nullptr) {
      sums.add(partial, out);
      next += 2 * tiling.slices * p.dim;
    }
    return partial;
  };
  const Partials partials = {take(p.dweight), take(p.dbias), take(p.dscale)};
  if (tiling.slices > 0 && (p.dx != nullptr || p.dy != nullptr || sums.count > 0)) {
    const cudaError_t error = rows_bwd(p, tiling, workspace, partials, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return sum_partials(DType::kFloat32, sums, 2 * tiling.slices, p.dim, stream);
}

}  // namespace mimkernels::cuda

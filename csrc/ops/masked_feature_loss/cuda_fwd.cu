#include "ops/masked_feature_loss/cuda.cuh"

namespace mimkernels::cuda {
namespace {

constexpr int kSharedBytes = kThreads / kWarp * static_cast<int>(sizeof(double));

// The sum of the warps' sums, in thread 0; `shared` holds one number a warp.
__device__ __forceinline__ double block_sum(double* shared, double of_warp) {
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = of_warp;
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / kWarp; ++w) {
      total += shared[w];
    }
  }
  return total;
}

// grid:     blocks of 256 threads; a warp owns one row of pred, then loops
// in:       pred [A, R, D] and target [B, N, D] by stride, last stride 1; ids int64 [A, R] or none
// out:      loss fp32 [A, R], 0 where the id names no token; or partial fp64 [blocks], the sum of
//           the block's losses; every element written exactly once
// numerics: fp32, lanes apart, then by a tree; the variance from deviations about 0, or about the
//           mean where that is not small beside them; sums over rows in fp64, in an order that
//           depends on the shape alone
// bounds:   tails are masked; offsets are int64
// cost:     rows of pred read once from memory, named rows of target too: again from the
//           first-level cache; 4 independent loads of each in flight per thread; 64 bytes of shared
//           memory; no atomics, deterministic
template <typename T, typename U, int VEC>
__global__ void __launch_bounds__(kThreads, 3)
    masked_feature_loss_fwd_kernel(MaskedFeatureLossParams p, int64_t rows, double* partial) {
  const int lane = threadIdx.x % kWarp;
  const int words = static_cast<int>(p.dim / VEC);
  double sum = 0.0;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < rows;
       i += int64_t{gridDim.x} * kWarps) {
    TokenPlace place;
    float loss = 0.0f;
    if (find_target(p, i, place)) {
      const T* const pred = pred_row<T>(p, i);
      const U* const target = row_at<U>(p.target, place.image, place.token);
      const RowNormal normal = normal_of<U, VEC>(p, target, words);
      if (p.kind == FeatureLossKind::kCosine) {
        const Products of = products_of<T, U, VEC>(pred, target, words, normal);
        loss =
            1.0f - of.pred_target * inverse_length(of.pred_pred) * inverse_length(of.target_target);
      } else {
        float share = 0.0f;
        for_each_pair<T, U, VEC>(pred, target, words, normal,
                                 [&](int, const float (&x)[VEC], const float (&t)[VEC]) {
                                   float part = 0.0f;
#pragma unroll
                                   for (int e = 0; e < VEC; ++e) {
                                     const float d = x[e] - t[e];
                                     const float size = fabsf(d);
                                     if (p.kind == FeatureLossKind::kMse) {
                                       part += d * d;
                                     } else if (p.kind == FeatureLossKind::kL1) {
                                       part += size;
                                     } else {
                                       const float least = size < p.beta ? size : p.beta;
                                       part += least * (size - 0.5f * least);
                                     }
                                   }
                                   share += part;
                                 });
        const float total = warp_sum(share);
        loss = (p.kind == FeatureLossKind::kSmoothL1 ? total / p.beta : total) /
               static_cast<float>(p.dim);
      }
      sum += static_cast<double>(loss);
    }
    if (!p.mean && lane == 0) {
      p.loss[i] = loss;
    }
  }
  if (p.mean) {
    const double total = block_sum(reinterpret_cast<double*>(shared_memory()), sum);
    if (threadIdx.x == 0) {
      partial[blockIdx.x] = total;
    }
  }
}

// grid:     one block of 256 threads
// in:       partial fp64 [blocks]
// out:      loss fp32 [1], the sum over the number of rows; 0 / 0 is NaN
// numerics: fp64, threads apart, then by a tree; rounded once
// bounds:   the tail is masked
// cost:     partial read once; 64 bytes of shared memory; no atomics, deterministic
__global__ void __launch_bounds__(kThreads)
    mean_feature_loss_kernel(const double* partial, int64_t blocks, int64_t rows, float* loss) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum += partial[i];
  }
  const double total = block_sum(reinterpret_cast<double*>(shared_memory()), warp_sum(sum));
  if (threadIdx.x == 0) {
    loss[0] = static_cast<float>(total / static_cast<double>(rows));
  }
}

int64_t blocks_of(int64_t rows) { return rows == 0 ? 0 : blocks_for(rows, kWarps); }

}  // namespace

int64_t masked_feature_loss_fwd_workspace(const MaskedFeatureLossParams& p) {
  return p.mean ? blocks_of(p.batch * p.length) : 0;
}

cudaError_t masked_feature_loss_fwd(const MaskedFeatureLossParams& p, double* workspace,
                                    cudaStream_t stream) {
  if (!fits(p)) {
    return cudaErrorInvalidValue;
  }
  const int64_t rows = p.batch * p.length;
  const int64_t blocks = blocks_of(rows);
  if (blocks > 0) {
    const cudaError_t error = with_feature_types(p, [&](auto pred, auto target, auto vec) {
      return launch(
          masked_feature_loss_fwd_kernel<decltype(pred), decltype(target), decltype(vec)::value>,
          dim3(static_cast<unsigned>(blocks)), kThreads, kSharedBytes, stream, p, rows, workspace);
    });
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (!p.mean) {
    return cudaSuccess;
  }
  return launch(mean_feature_loss_kernel, dim3(1), kThreads, kSharedBytes, stream, workspace,
                blocks, rows, p.loss);
}

}  // namespace mimkernels::cuda

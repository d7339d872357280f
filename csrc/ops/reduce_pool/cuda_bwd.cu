#include "cuda/device.cuh"
#include "cuda/sums.cuh"
#include "ops/reduce_pool/cuda.cuh"

namespace mimkernels::cuda {
namespace {

bool words_fit(const ReducePoolParams& p) {
  return rows_aligned(p.dout, p.dim, p.dtype) && rows_aligned({p.dx, 0, 0}, p.dim, p.dtype) &&
         rows_aligned(p.x, p.dim, p.dtype);
}

ReduceTiling tiling_of(const ReducePoolParams& p) {
  ReduceTiling tiling;
  tiling.words = words_fit(p) ? p.dim * element_size(p.dtype) / 16 : p.dim;
  tiling.chunks = ceil_div(tiling.words, kWarp);
  if (p.batch * p.tokens * p.dim == 0) {
    return tiling;
  }
  tiling.per_slice = slice_length(p.tokens, p.batch * tiling.chunks);
  tiling.slices = ceil_div(p.tokens, tiling.per_slice);
  tiling.items = p.batch * tiling.chunks * tiling.slices;
  return tiling;
}

// grid:     blocks of 256 threads; a block owns 32 words of the columns of a slice of one image's
//           tokens, its warps every eighth batch of 4 tokens; then loops
// in:       dout [B, D], and x [B, N, D] for the power mean, by stride, last stride 1; index or
//           moment of the forward [B, D]; mask bool [B, N] by stride, or none; p fp32 [1]
// out:      dx [B, N, D] or none; shares fp32 [items] or none, each block's share of dp;
//           contiguous, every element written exactly once
// numerics: fp32, rounded once; with M the moment and z = max(x, eps),
//           dx = dout M^(1/p - 1) z^(p - 1) / count unless x < eps,
//           dp = dout M^(1/p - 1) mean of z^p (log z - log M / p) / p; both 0 where M is
// bounds:   tails are masked, zeros where a token is not allowed; offsets are int64
// cost:     x read once (power mean), dx written once; 4 independent loads in flight per thread; 32
//           bytes of shared memory; no atomics, deterministic
template <typename T, int VEC, ReduceKind KIND>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_pool_bwd_kernel(ReducePoolParams p, AllowedTokens allowed, ReduceTiling tiling,
                           float* shares) {
  using W = Word<T, VEC>;
  float* const parts = reinterpret_cast<float*>(shared_memory());  // [8]
  const int warp = threadIdx.x / kWarp;
  const float exponent = KIND == ReduceKind::kGem ? __ldg(p.p) : 1.0f;
  for (int64_t item = blockIdx.x; item < tiling.items; item += gridDim.x) {
    const ReduceItem at(tiling, item);
    const bool active = at.word < tiling.words;
    const int64_t count =
        KIND == ReduceKind::kMax ? 1 : count_allowed(allowed, at.b, reinterpret_cast<int*>(parts));
    const int64_t column = at.word * VEC;
    float factor[VEC] = {};
    float center[VEC] = {};
    int32_t index[VEC] = {};
    if (active) {
      unpack_word<T, VEC>(factor,
                          __ldg(reinterpret_cast<const W*>(row_at<T>(p.dout, 0, at.b)) + at.word));
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        factor[e] /= static_cast<float>(count > 0 ? count : 1);
        if constexpr (KIND == ReduceKind::kMax) {
          index[e] = __ldg(p.index + at.b * p.dim + column + e);
        } else if constexpr (KIND == ReduceKind::kGem) {
          float moment = count > 0 ? __ldg(p.moment + at.b * p.dim + column + e) : 1.0f;
          if (moment == 0.0f) {
            moment = 1.0f;
            factor[e] = 0.0f;
          }
          const float log_moment = logf(moment);
          center[e] = log_moment / exponent;
          // M^(1/p - 1) = M^(1/p) / M, rounded less, where M is finite.
          factor[e] *= isfinite(moment) ? expf(center[e]) / moment
                                        : power(log_moment, 1.0f / exponent - 1.0f);
        }
      }
    }
    const int64_t end = min(p.tokens, (at.slice + 1) * tiling.per_slice);
    float share = 0.0f;
    for (int64_t n = at.slice * tiling.per_slice + warp * kTokens; n < end; n += kWarps * kTokens) {
      bool wanted[kTokens];
      W words[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        wanted[i] = active && n + i < end && allowed(at.b, n + i);
        words[i] = W{};
        if constexpr (KIND == ReduceKind::kGem) {
          const W* const row = reinterpret_cast<const W*>(row_at<T>(p.x, at.b, n + i));
          words[i] = wanted[i] ? __ldg(row + at.word) : W{};
        }
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        float dx[VEC] = {};
        if (wanted[i]) {
          float x[VEC];
          unpack_word<T, VEC>(x, words[i]);
#pragma unroll
          for (int e = 0; e < VEC; ++e) {
            if constexpr (KIND == ReduceKind::kMean) {
              dx[e] = factor[e];
            } else if constexpr (KIND == ReduceKind::kMax) {
              dx[e] = index[e] == static_cast<int32_t>(n + i) ? factor[e] : 0.0f;
            } else {
              const float z = at_least(x[e], p.eps);
              const float log_z = logf(z);
              const float slope = factor[e] * power(log_z, exponent - 1.0f);
              dx[e] = x[e] < p.eps ? 0.0f : slope;  // that of NaN is NaN
              share = fmaf(slope * z, log_z - center[e], share);
            }
          }
        }
        if (p.dx != nullptr && active && n + i < end) {
          T* const row = static_cast<T*>(p.dx) + (at.b * p.tokens + n + i) * p.dim;
          reinterpret_cast<W*>(row)[at.word] = pack<T, VEC>(dx);
        }
      }
    }
    if constexpr (KIND == ReduceKind::kGem) {
      if (shares != nullptr) {
        share = warp_sum(share);
        if (threadIdx.x % kWarp == 0) {
          parts[warp] = share;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
          for (int w = 1; w < kWarps; ++w) {
            share += parts[w];
          }
          shares[item] = share / exponent;
        }
        __syncthreads();
      }
    }
  }
}

// grid:     one block of 256 threads
// in:       shares fp32 [count]
// out:      [1], their sum
// numerics: fp32, each thread's in order, then a tree, then the warps
// cost:     shares read once; 32 bytes of shared memory; no atomics, deterministic
__global__ void __launch_bounds__(kThreads)
    sum_shares_kernel(const float* shares, int64_t count, float* out) {
  float* const parts = reinterpret_cast<float*>(shared_memory());  // [8]
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += __ldg(shares + i);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) {
    parts[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      sum += parts[w];
    }
    out[0] = sum;
  }
}

constexpr int kShared = kWarps * static_cast<int>(sizeof(float));

}  // namespace

int64_t reduce_pool_bwd_workspace(const ReducePoolParams& p) {
  return p.dp == nullptr ? 0 : tiling_of(p).items;
}

cudaError_t reduce_pool_bwd(const ReducePoolParams& p, float* workspace, cudaStream_t stream) {
  const int64_t shares = reduce_pool_bwd_workspace(p);
  if (p.tokens > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  if (p.batch * p.tokens * p.dim > 0 && (p.dx != nullptr || p.dp != nullptr)) {
    const cudaError_t error =
        with_reduce_kind(p, words_fit(p), [&](auto type, auto vec, auto kind) {
          const ReduceTiling tiling = tiling_of(p);
          return launch(
              reduce_pool_bwd_kernel<decltype(type), decltype(vec)::value, decltype(kind)::value>,
              blocks_for(tiling.items, 1), kThreads, kShared, stream, p,
              AllowedTokens{p.mask, p.num_prefix, p.tokens}, tiling,
              shares > 0 ? workspace : nullptr);
        });
    if (error != cudaSuccess) {
      return error;
    }
  }
  return p.dp == nullptr ? cudaSuccess
                         : launch(sum_shares_kernel, dim3(1), kThreads, kShared, stream, workspace,
                                  shares, p.dp);
}

}  // namespace mimkernels::cuda

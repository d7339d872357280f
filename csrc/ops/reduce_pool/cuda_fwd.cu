#include "cuda/device.cuh"
#include "ops/reduce_pool/cuda.cuh"

namespace mimkernels::cuda {
namespace {

// Follows the largest so far and its token; NaN is larger than anything, the first of equals wins.
__device__ __forceinline__ void follow(float& best, int32_t& index, float x, int32_t n) {
  const bool both_nan = x != x && best != best;
  const bool larger = index < 0 || x > best || (x != x && best == best);
  const bool earlier = (x == best || both_nan) && n < index;
  if (n >= 0 && (larger || earlier)) {
    best = x;
    index = n;
  }
}

// grid:     blocks of 256 threads; a block owns 32 words of the columns of one image, its warps
//           every eighth batch of 4 tokens; then loops
// in:       x [B, N, D] by stride, last stride 1; mask bool [B, N] by stride, or none; p fp32 [1]
// out:      out [B, D]; index int32 [B, D] of the maximum, moment fp32 [B, D] of the power mean;
//           contiguous, every element written exactly once
// numerics: fp32, each warp's tokens in order, then the warps; powers as exp(p log x)
// bounds:   tails are masked, tokens that are not allowed not read; offsets are int64
// cost:     x read once, 4 independent loads per thread, prefetched; 32 * VEC * 32 bytes of shared
//           memory, twice that for the maximum; no atomics, deterministic
template <typename T, int VEC, ReduceKind KIND>
__global__ void __launch_bounds__(kThreads, 3)
    reduce_pool_fwd_kernel(ReducePoolParams p, AllowedTokens allowed, ReduceTiling tiling) {
  using W = Word<T, VEC>;
  float* const shared = reinterpret_cast<float*>(shared_memory());              // [8, VEC * 32]
  int32_t* const tokens = reinterpret_cast<int32_t*>(shared + kThreads * VEC);  // the same, kMax
  int* const counts = reinterpret_cast<int*>(shared);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const float exponent = KIND == ReduceKind::kGem ? __ldg(p.p) : 1.0f;
  for (int64_t item = blockIdx.x; item < tiling.items; item += gridDim.x) {
    const ReduceItem at(tiling, item);
    const bool active = at.word < tiling.words;
    const int64_t count = KIND == ReduceKind::kMax ? 0 : count_allowed(allowed, at.b, counts);
    float sums[VEC] = {};
    int32_t index[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      index[e] = -1;
    }
    Prefetched<W, kTokens> next;
    const T* from = row_at<T>(p.x, at.b, warp * kTokens) + at.word * VEC;
    const auto load = [&](int64_t n) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        next.wanted[i] = active && allowed(at.b, n + i);
        const W* const word = reinterpret_cast<const W*>(from + i * p.x.stride1);
        next.words[i] = next.wanted[i] ? __ldg(word) : W{};
      }
      from += kWarps * kTokens * p.x.stride1;
    };
    load(warp * kTokens);
    for (int64_t n = warp * kTokens; n < p.tokens; n += kWarps * kTokens) {
      const auto [words, wanted] = next;
      load(n + kWarps * kTokens);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (!wanted[i]) {
          continue;
        }
        float x[VEC];
        unpack_word<T, VEC>(x, words[i]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          if constexpr (KIND == ReduceKind::kMax) {
            follow(sums[e], index[e], x[e], static_cast<int32_t>(n + i));
          } else if constexpr (KIND == ReduceKind::kMean) {
            sums[e] += x[e];
          } else {
            sums[e] += power(logf(at_least(x[e], p.eps)), exponent);
          }
        }
      }
    }
    const int64_t row = at.b * p.dim;
    if constexpr (KIND == ReduceKind::kMax) {
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        shared[(warp * VEC + e) * kWarp + lane] = sums[e];
        tokens[(warp * VEC + e) * kWarp + lane] = index[e];
      }
      __syncthreads();
    } else {
      sum_warps<VEC>(shared, sums);
    }
    for (int i = threadIdx.x; i < VEC * kWarp; i += kThreads) {
      const int64_t column = column_of<VEC>(at.chunk, i);
      if (column >= p.dim) {
        continue;
      }
      float value = shared[place_of<VEC>(i)];
      if constexpr (KIND == ReduceKind::kMax) {
        int32_t n = tokens[place_of<VEC>(i)];
        for (int w = 1; w < kWarps; ++w) {
          const int place = w * VEC * kWarp + place_of<VEC>(i);
          follow(value, n, shared[place], tokens[place]);
        }
        p.index[row + column] = n;
      } else {
        value /= static_cast<float>(count > 0 ? count : 1);
      }
      if constexpr (KIND == ReduceKind::kGem) {
        p.moment[row + column] = value;
        value = count > 0 ? expf(logf(value) / exponent) : 0.0f;
      }
      static_cast<T*>(p.out)[row + column] = from_float<T>(value);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t reduce_pool_fwd(const ReducePoolParams& p, cudaStream_t stream) {
  if (p.batch * p.dim == 0) {
    return cudaSuccess;
  }
  if (p.tokens > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  return with_reduce_kind(
      p, rows_aligned(p.x, p.dim, p.dtype), [&](auto type, auto vec, auto kind) {
        using T = decltype(type);
        constexpr int kVec = decltype(vec)::value;
        constexpr ReduceKind kKind = decltype(kind)::value;
        ReduceTiling tiling;
        tiling.words = p.dim / kVec;
        tiling.chunks = ceil_div(tiling.words, kWarp);
        tiling.items = p.batch * tiling.chunks;
        const int arrays = kKind == ReduceKind::kMax ? 2 : 1;
        return launch(reduce_pool_fwd_kernel<T, kVec, kKind>, blocks_for(tiling.items, 1), kThreads,
                      arrays * kThreads * kVec * static_cast<int>(sizeof(float)), stream, p,
                      AllowedTokens{p.mask, p.num_prefix, p.tokens}, tiling);
      });
}

}  // namespace mimkernels::cuda

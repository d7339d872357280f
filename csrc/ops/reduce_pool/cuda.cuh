// What both directions of reduce_pool share: a block's piece of the work, the count of its image's
// tokens, powers.
#pragma once

#include "cuda/pooling/pool.cuh"
#include "ops/reduce_pool/cuda.h"

namespace mimkernels::cuda {

// Items of work, 32 words of columns of one image each, or of a slice of its tokens.
struct ReduceTiling {
  int64_t words = 0;   // of a row
  int64_t chunks = 0;  // of a row
  int64_t slices = 1;  // of the tokens
  int64_t per_slice = 0;
  int64_t items = 0;  // in all
};

struct ReduceItem {
  int64_t b;
  int64_t chunk;
  int64_t slice;
  int64_t word;  // this lane's

  __device__ __forceinline__ ReduceItem(const ReduceTiling& tiling, int64_t item) {
    b = divide(divide(item, tiling.chunks, chunk), tiling.slices, slice);
    word = chunk * kWarp + threadIdx.x % kWarp;
  }
};

// How many tokens of image b may be pooled. All threads of the block; `counts` holds 8 numbers.
__device__ __forceinline__ int64_t count_allowed(const AllowedTokens& allowed, int64_t b,
                                                 int* counts) {
  if (!allowed.mask.given) {
    return allowed.tokens - allowed.num_prefix;
  }
  int count = 0;
  for (int64_t n = threadIdx.x; n < allowed.tokens; n += kThreads) {
    count += allowed(b, n);
  }
  count = warp_sum(count);
  if (threadIdx.x % kWarp == 0) {
    counts[threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  count = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    count += counts[w];
  }
  __syncthreads();
  return count;
}

// max(x, eps), NaN for NaN.
__device__ __forceinline__ float at_least(float x, float eps) { return x < eps ? eps : x; }

// z^p of positive z, infinity and NaN included; z^0 = 1 even of these.
__device__ __forceinline__ float power(float log_z, float p) {
  return p == 0.0f ? 1.0f : expf(p * log_z);
}

// Calls body(T{}, Vec, Kind) with the types of a launch as values of std::integral_constant.
template <typename Body>
cudaError_t with_reduce_kind(const ReducePoolParams& p, bool aligned, const Body& body) {
  return with_float_type(p.dtype, [&](auto type) {
    const auto with_kind = [&](auto vec) {
      switch (p.kind) {
        case ReduceKind::kMean:
          return body(type, vec, std::integral_constant<ReduceKind, ReduceKind::kMean>{});
        case ReduceKind::kMax:
          return body(type, vec, std::integral_constant<ReduceKind, ReduceKind::kMax>{});
        case ReduceKind::kGem:
          return body(type, vec, std::integral_constant<ReduceKind, ReduceKind::kGem>{});
      }
      return cudaErrorInvalidValue;
    };
    return aligned ? with_kind(std::integral_constant<int, 16 / sizeof(type)>{})
                   : with_kind(std::integral_constant<int, 1>{});
  });
}

}  // namespace mimkernels::cuda

// head_divergence from lse, without the N x N matrix.
#include "cuda/attention/cosine_factors.h"
#include "cuda/attention/lse_low.h"
#include "cuda/attention/scores.cuh"
#include "ops/head_divergence/cuda.h"

namespace mimkernels::cuda {
namespace {

constexpr int kSide = kDivergenceHeads / 2;  // heads that a block compares with as many others
constexpr int kHeads = kDivergenceHeads;

// The first head of a block's `side`: 0, those whose P weighs; 1, those they are compared with.
struct HeadPair {
  int image;
  int first[2];

  __device__ __forceinline__ explicit HeadPair(int blocks) {
    const int block = static_cast<int>(blockIdx.x);
    image = block / (blocks * blocks);
    first[0] = block / blocks % blocks * kSide;
    first[1] = block % blocks * kSide;
  }
  // The i-th of the block's heads.
  __device__ __forceinline__ int head(int i) const {
    return (i < kSide ? first[0] : first[1]) + i % kSide;
  }
};

// grid:     B * cdiv(H, 4)^2; a block compares 4 heads with 4 others over all queries and keys
// in:       q, k by stride, features contiguous; lse, lse_low fp32 [B, H, Nq] contiguous; bias by
//           stride (0 where broadcast), table and index, key mask and factors, each or none
// out:      out fp32 [B, H, H] = mean over queries of sum over keys of P^h (log P^h - log P^g);
//           contiguous, every element written once
// numerics: fp32; logarithms are subtracted before they are weighted, so that equal heads give 0;
//           they are scaled by a power of two, so that no sum overflows where the mean does not
// bounds:   keys that do not exist, or that one of the two heads does not see, and queries beyond
//           the last count nothing
// cost:     the logarithms of a 16 x 16 group of 8 heads lie in shared memory, where only the lane
//           that wrote them reads them; q and k of a head are read cdiv(H, 4) * 2 times from L2; no
//           atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kDivergenceWarps* kWarp, 1)
    head_divergence_kernel(HeadDivergenceParams p, const float* low, int blocks, RowShape<T> shape,
                           bool q_aligned, bool k_aligned) {
  constexpr int kWords = 9;  // of a lane and head: 8 logarithms, and bits that say which are finite
  const AttentionScores& s = p.scores;
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const int tile = warps * kStrip;
  const int tiles = (keys + tile - 1) / tile;
  const int steps = (queries + kStrip - 1) / kStrip * tiles * kHeads;
  const HeadPair pair(blocks);
  // 1 over the power of two from `queries` up.
  const int doublings = queries > 1 ? kWarp - __clz(queries - 1) : 0;
  const float unit = __uint_as_float(static_cast<unsigned>(127 - doublings) << 23);
  const float units_of_one = __uint_as_float(static_cast<unsigned>(127 + doublings) << 23);
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int slot = (kStrip + tile) * shape.stride;
  float* const words =
      reinterpret_cast<float*>(shared + 2 * slot) + warp * kHeads * kWords * kWarp + lane;
  // A step is one head's 16 queries and its keys of one tile.
  const auto start = [&](int step) {
    const int head = pair.head(step % kHeads);
    const int first_key = step / kHeads % tiles * tile;
    const int first_query = step / kHeads / tiles * kStrip;
    T* const to = shared + step % 2 * slot;
    if (head < heads) {
      load_rows(to, shape.stride, shape.chunks, head_at<T>(s.q, pair.image, head, first_query),
                s.q.stride_token, kStrip, queries - first_query, dim, q_aligned,
                static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
      load_rows(to + kStrip * shape.stride, shape.stride, shape.chunks,
                head_at<T>(s.k, pair.image, head, first_key), s.k.stride_token, tile,
                keys - first_key, dim, k_aligned, static_cast<int>(threadIdx.x),
                static_cast<int>(blockDim.x));
    }
    copy_async_commit();
  };

  float sum[kSide][kSide] = {};
  for (int step = -1; step < steps; ++step) {
    if (step >= 0) {
      copy_async_wait<0>();
      __syncthreads();
    }
    if (step + 1 < steps) {
      start(step + 1);
    }
    if (step < 0) {
      continue;
    }
    const int first_key = step / kHeads % tiles * tile + warp * kStrip;
    const int first_query = step / kHeads / tiles * kStrip;
    const int head = pair.head(step % kHeads);
    if (first_key >= keys) {
      continue;
    }
    if (head < heads) {
      const T* const rows = shared + step % 2 * slot;
      const HeadTerms terms(s, pair.image, head);
      const GroupTerms group = load_terms<T, false>(terms, first_query, first_key);
      Level level[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        level[n] = load_level<float>(p.lse, low, int64_t{pair.image} * heads + head, queries,
                                     query_token<false>(first_query, 0, n));
      }
      float score[2][4];
      multiply_rows<T>(score, rows, rows + (kStrip + warp * kStrip) * shape.stride, shape.stride,
                       shape.steps);
      make_cosines<false>(score, terms, first_query, first_key);
      subtract_lse<false>(score, group, level, s.scale);
      float* const own = words + step % kHeads * kWords * kWarp;
      unsigned seen = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float log_p = score[e / 4][e % 4] - level[query_of<false>(e)].low;
        seen |= static_cast<unsigned>(log_p != -kInfinity) << e;
        own[e * kWarp] = log_p * unit;
      }
      own[8 * kWarp] = __uint_as_float(seen);
    }
    if (step % kHeads + 1 < kHeads) {
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int h = 0; h < kSide; ++h) {
        if (pair.first[0] + h >= heads) {
          continue;
        }
        const float* const own = words + h * kWords * kWarp;
        const float log_p = own[e * kWarp];
        const float weight = power<T>(log_p * (units_of_one * kUnitsOfOne<T>));
#pragma unroll
        for (int g = 0; g < kSide; ++g) {
          if (pair.first[1] + g < heads) {
            const float* const other = words + (kSide + g) * kWords * kWarp;
            const unsigned seen =
                __float_as_uint(own[8 * kWarp]) & __float_as_uint(other[8 * kWarp]);
            if (seen >> e & 1) {
              sum[h][g] = fmaf(weight, log_p - other[e * kWarp], sum[h][g]);
            }
          }
        }
      }
    }
  }
  copy_async_wait<0>();

  // Lanes, then warps.
  float* const of_warps = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSide * kSide; ++i) {
    float total = add_quad(sum[i / kSide][i % kSide]);
    total += __shfl_xor_sync(kWarpMask, total, 4);
    total += __shfl_xor_sync(kWarpMask, total, 8);
    total += __shfl_xor_sync(kWarpMask, total, 16);
    if (lane == 0) {
      of_warps[i * warps + warp] = total;
    }
  }
  __syncthreads();
  const int h = pair.first[0] + static_cast<int>(threadIdx.x) / kSide;
  const int g = pair.first[1] + static_cast<int>(threadIdx.x) % kSide;
  if (threadIdx.x < kSide * kSide && h < heads && g < heads) {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) {
      total += of_warps[threadIdx.x * warps + w];
    }
    p.out[(int64_t{pair.image} * heads + h) * heads + g] =
        total / (static_cast<float>(queries) * unit);
  }
}

}  // namespace

int64_t head_divergence_fwd_workspace(const HeadDivergenceParams& p) {
  return p.scores.batch * p.scores.heads * p.scores.queries + cosine_factors_workspace(p.scores);
}

cudaError_t head_divergence_fwd(const HeadDivergenceParams& given, float* low,
                                cudaStream_t stream) {
  HeadDivergenceParams p = given;
  const AttentionScores& s = p.scores;
  if (s.batch * s.heads == 0) {
    return cudaSuccess;
  }
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t error = cosine_factors(p.scores, low + s.batch * s.heads * s.queries, stream);
    if (error == cudaSuccess) {
      error = lse_low(s, p.lse, low, stream);
    }
    if (error != cudaSuccess) {
      return error;
    }
    const RowShape<T> shape(s.dim);
    const DivergenceTiling tiling(static_cast<int>(s.dim), sizeof(T));
    const int blocks = int_ceil_div(s.heads, kSide);
    return launch(head_divergence_kernel<T>, dim3(static_cast<unsigned>(s.batch) * blocks * blocks),
                  tiling.warps * kWarp, tiling.shared_bytes, stream, p, low, blocks, shape,
                  aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)));
  });
}

}  // namespace mimkernels::cuda

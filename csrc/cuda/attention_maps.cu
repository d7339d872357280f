// Statistics of the attention map that are no row sums, from lse, without the N x N matrix.
#include "cuda/attention.h"
#include "cuda/attention_tile.cuh"

namespace mimkernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kTile = 64;
constexpr int kSide = 4;  // heads that a block compares with as many others

// grid:     row blocks of 16 keys per warp, fastest, times B * H; short heads share a block
// in:       q, k by stride, features contiguous; lse fp32 [B, H, Nq] contiguous; bias by stride (0
//           where broadcast) and key mask, each or none
// out:      out fp32 [B, H, Nk] = mean over queries of P; contiguous, every element written once
// numerics: fp32; P from lse as in the backward of attention; a lane adds its queries in order
// bounds:   queries beyond the last, and those that may attend nothing, have P = 0
// cost:     k read once, q once per row block, two tiles in shared memory; no atomics,
//           deterministic
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    received_attention_kernel(ReceivedAttentionParams p, StripCut cut, RowShape<T> shape,
                              bool q_aligned, bool k_aligned) {
  const AttentionScores& s = p.scores;
  const int images = static_cast<int>(s.batch);
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int lane = threadIdx.x % kWarp;
  const WarpPlace place(cut, images * heads, keys);
  const HeadTerms terms(s, place.busy ? place.head / heads : 0,
                        place.busy ? place.head % heads : 0);
  T* const shared = reinterpret_cast<T*>(shared_memory());
  T* const strip = shared + threadIdx.x / kWarp * kStrip * shape.stride;
  T* const slots = shared + blockDim.x / kWarp * kStrip * shape.stride;
  const int matrix = cut.heads * cut.tile * shape.stride;
  const auto start = [&](int tile) {
    load_tile(slots + tile % 2 * matrix, shape.stride, shape.chunks, s.q, images, heads, cut,
              place.first_head, tile, queries, dim, q_aligned);
    copy_async_commit();
  };
  load_strip(strip, shape.stride, shape.chunks, s.k, heads, place, keys, dim, k_aligned);
  if (cut.tiles > 0) {
    start(0);
  }

  float sum[2] = {};
  for (int tile = 0; tile < cut.tiles; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    if (tile + 1 < cut.tiles) {
      start(tile + 1);
    }
    if (!place.busy) {
      continue;
    }
    const T* const rows = slots + tile % 2 * matrix + place.local_head * cut.tile * shape.stride;
    const int groups = (min(queries - tile * cut.tile, cut.tile) + kStrip - 1) / kStrip;
#pragma unroll 1
    for (int j = 0; j < groups; ++j) {
      const int first = tile * cut.tile + j * kStrip;
      const GroupTerms group = load_terms<T, true>(terms, place.first, first);
      float level[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        level[n] = load_level<T>(p.lse, place.head, queries, query_token<true>(0, first, n));
      }
      float score[2][4];
      float exponent[2][4];
      multiply_rows<T>(score, left_row(strip, shape.stride),
                       right_row(rows + j * kStrip * shape.stride, shape.stride), shape.steps);
      make_probabilities<T, true>(score, exponent, group, level, s.scale);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[i % 4 / 2] += score[i / 4][i % 4];
      }
    }
  }
  copy_async_wait<0>();
  if (!place.busy) {
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = add_quad(sum[half]);
    const int key = place.first + lane / 4 + 8 * half;
    if (lane % 4 == 0 && key < keys) {
      p.out[int64_t{place.head} * keys + key] = total / static_cast<float>(queries);
    }
  }
}

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
  // The i-th of the block's 2 * kSide heads.
  __device__ __forceinline__ int head(int i) const { return first[i / kSide] + i % kSide; }
};

// grid:     B * cdiv(H, 4)^2; a block compares 4 heads with 4 others over all queries and keys
// in:       q, k by stride, features contiguous; lse fp32 [B, H, Nq] contiguous; bias by stride (0
//           where broadcast) and key mask, each or none
// out:      out fp32 [B, H, H] = mean over queries of sum over keys of P^h (log P^h - log P^g);
//           contiguous, every element written once
// numerics: fp32; logarithms are subtracted before they are weighted, so that equal heads give 0.
//           A key that the bias hides has P = 0 and counts as a score of 0 in the logarithm
// bounds:   keys beyond the last and masked keys, and queries beyond the last, have P = 0
// cost:     a warp holds the logarithms of a 16 x 16 group of 8 heads in registers; q and k of a
//           head are read cdiv(H, 4) * 2 times from L2; no atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    head_divergence_kernel(HeadDivergenceParams p, int blocks, RowShape<T> shape, bool q_aligned,
                           bool k_aligned) {
  const AttentionScores& s = p.scores;
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const HeadPair pair(blocks);
  const int tiles = (keys + kTile - 1) / kTile;
  const int steps = (queries + kStrip - 1) / kStrip * tiles * 2 * kSide;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int slot = (kStrip + kTile) * shape.stride;
  // A step is one head's 16 queries and 64 keys.
  const auto start = [&](int step) {
    const int head = pair.head(step % (2 * kSide));
    const int first_key = step / (2 * kSide) % tiles * kTile;
    const int first_query = step / (2 * kSide) / tiles * kStrip;
    T* const to = shared + step % 2 * slot;
    if (head < heads) {
      load_rows(to, shape.stride, shape.chunks, head_at<T>(s.q, pair.image, head, first_query),
                s.q.stride_token, kStrip, queries - first_query, dim, q_aligned,
                static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
      load_rows(to + kStrip * shape.stride, shape.stride, shape.chunks,
                head_at<T>(s.k, pair.image, head, first_key), s.k.stride_token, kTile,
                keys - first_key, dim, k_aligned, static_cast<int>(threadIdx.x),
                static_cast<int>(blockDim.x));
    }
    copy_async_commit();
  };
  if (steps > 0) {
    start(0);
  }

  float sum[kSide][kSide] = {};
  for (int step = 0; step < steps; step += 2 * kSide) {
    const int first_key = step / (2 * kSide) % tiles * kTile + warp * kStrip;
    const int first_query = step / (2 * kSide) / tiles * kStrip;
    float log_p[2 * kSide][2][4];
    unsigned seen[kSide];  // of the weighing heads; bits as of GroupTerms::hidden
#pragma unroll
    for (int i = 0; i < 2 * kSide; ++i) {
      copy_async_wait<0>();
      __syncthreads();
      if (step + i + 1 < steps) {
        start(step + i + 1);
      }
      const int head = pair.head(i);
      if (head >= heads || first_key >= keys) {
        continue;
      }
      const T* const rows = shared + i % 2 * slot;
      const GroupTerms group =
          load_terms<T, false>(HeadTerms(s, pair.image, head), first_query, first_key);
      float level[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int query = query_token<false>(first_query, 0, n);
        const float lse =
            query < queries ? p.lse[(int64_t{pair.image} * heads + head) * queries + query] : 0.0f;
        level[n] = lse == -kInfinity ? 0.0f : lse;
      }
      multiply_rows<T>(log_p[i], left_row(rows, shape.stride),
                       right_row(rows + (kStrip + warp * kStrip) * shape.stride, shape.stride),
                       shape.steps);
      finish_scores(log_p[i], group, false, true, s.scale);
      unsigned here = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& x = log_p[i][e / 4][e % 4];
        const int query = query_token<false>(first_query, 0, query_of<false>(e));
        here |= static_cast<unsigned>(x != -kInfinity && query < queries) << e;
        x = (x == -kInfinity ? 0.0f : x) - level[query_of<false>(e)];
      }
      if (i < kSide) {
        seen[i] = here;
      }
    }
    if (first_key >= keys) {
      continue;
    }
#pragma unroll
    for (int h = 0; h < kSide; ++h) {
      if (pair.first[0] + h >= heads) {
        continue;
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float own = log_p[h][e / 4][e % 4];
        const float weight = seen[h] >> e & 1 ? power<T>(own * kUnitsOfOne<T>) : 0.0f;
#pragma unroll
        for (int g = 0; g < kSide; ++g) {
          if (pair.first[1] + g < heads) {
            sum[h][g] = fmaf(weight, own - log_p[kSide + g][e / 4][e % 4], sum[h][g]);
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
    total += __shfl_xor_sync(kAll, total, 4);
    total += __shfl_xor_sync(kAll, total, 8);
    total += __shfl_xor_sync(kAll, total, 16);
    if (lane == 0) {
      of_warps[i * kWarps + warp] = total;
    }
  }
  __syncthreads();
  const int h = pair.first[0] + static_cast<int>(threadIdx.x) / kSide;
  const int g = pair.first[1] + static_cast<int>(threadIdx.x) % kSide;
  if (threadIdx.x < kSide * kSide && h < heads && g < heads) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      total += of_warps[threadIdx.x * kWarps + w];
    }
    p.out[(int64_t{pair.image} * heads + h) * heads + g] = total / static_cast<float>(queries);
  }
}

}  // namespace

cudaError_t received_attention_fwd(const ReceivedAttentionParams& p, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  if (s.batch * s.heads * s.keys == 0) {
    return cudaSuccess;
  }
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const RowShape<T> shape(s.dim);
    const StripCut cut =
        cut_strips(s.keys, s.queries, 1, 1, shape.stride * sizeof(T), kWarps, kTile);
    return launch(received_attention_kernel<T>, dim3(cut.blocks(s.batch * s.heads)),
                  cut.warps() * kWarp, cut.shared_bytes, stream, p, cut, shape,
                  aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)));
  });
}

cudaError_t head_divergence_fwd(const HeadDivergenceParams& p, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  if (s.batch * s.heads == 0) {
    return cudaSuccess;
  }
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const RowShape<T> shape(s.dim);
    const int blocks = cut_up(s.heads, kSide);
    const int shared_bytes = 2 * (kStrip + kTile) * shape.stride * static_cast<int>(sizeof(T));
    return launch(head_divergence_kernel<T>, dim3(static_cast<unsigned>(s.batch) * blocks * blocks),
                  kWarps * kWarp, shared_bytes, stream, p, blocks, shape,
                  aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)));
  });
}

}  // namespace mimkernels::cuda

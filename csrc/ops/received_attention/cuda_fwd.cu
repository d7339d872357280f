// received_attention from lse, without the N x N matrix.
#include "cuda/attention/cosine_factors.h"
#include "cuda/attention/lse_low.h"
#include "cuda/attention/scores.cuh"
#include "ops/received_attention/cuda.h"

namespace mimkernels::cuda {
namespace {

// grid:     row blocks of 16 keys per warp, fastest, times B * H; short heads share a block
// in:       q, k by stride, features contiguous; lse, lse_low fp32 [B, H, Nq] contiguous; bias by
//           stride (0 where broadcast), table and index, key mask and factors, each or none
// out:      out fp32 [B, H, Nk] = mean over queries of P; contiguous, every element written once
// numerics: fp32; P from lse and lse_low as in the backward of attention; a lane adds its queries
//           in order, compensated
// bounds:   queries beyond the last, and those that may attend nothing, have P = 0
// cost:     k read once, q once per row block, two tiles in shared memory; no atomics,
//           deterministic
template <typename T>
__global__ void __launch_bounds__(kReceivedWarps* kWarp, 1)
    received_attention_kernel(ReceivedAttentionParams p, const float* low, StripTiling tiling,
                              RowShape<T> shape, bool q_aligned, bool k_aligned) {
  const AttentionScores& s = p.scores;
  const int images = static_cast<int>(s.batch);
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int lane = threadIdx.x % kWarp;
  const WarpPlace place(tiling, images * heads, keys);
  const HeadTerms terms(s, place.busy ? place.head / heads : 0,
                        place.busy ? place.head % heads : 0);
  T* const shared = reinterpret_cast<T*>(shared_memory());
  T* const strip = shared + threadIdx.x / kWarp * kStrip * shape.stride;
  T* const slots = shared + blockDim.x / kWarp * kStrip * shape.stride;
  const int matrix = tiling.heads * tiling.tile * shape.stride;
  const auto start = [&](int tile) {
    load_tile(slots + tile % 2 * matrix, shape.stride, shape.chunks, s.q, images, heads, tiling,
              place.first_head, tile, queries, dim, q_aligned);
    copy_async_commit();
  };
  load_strip(strip, shape.stride, shape.chunks, s.k, heads, place, keys, dim, k_aligned);
  copy_async_commit();  // with no token on the other side, no tile would

  float sum[2] = {};
  float excess[2] = {};  // of sum over the exact one
  for (int tile = -1; tile < tiling.tiles; ++tile) {
    if (tile >= 0) {
      copy_async_wait<0>();
      __syncthreads();
    }
    if (tile + 1 < tiling.tiles) {
      start(tile + 1);
    }
    if (tile < 0 || !place.busy) {
      continue;
    }
    const T* const rows = slots + tile % 2 * matrix + place.local_head * tiling.tile * shape.stride;
    const int groups = (min(queries - tile * tiling.tile, tiling.tile) + kStrip - 1) / kStrip;
#pragma unroll 1
    for (int j = 0; j < groups; ++j) {
      const int first = tile * tiling.tile + j * kStrip;
      const GroupTerms group = load_terms<T, true>(terms, place.first, first);
      Level level[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        level[n] = load_level<T>(p.lse, low, place.head, queries, query_token<true>(0, first, n));
      }
      float score[2][4];
      float exponent[2][4];
      multiply_rows<T>(score, strip, rows + j * kStrip * shape.stride, shape.stride, shape.steps);
      make_cosines<true>(score, terms, place.first, first);
      make_probabilities<T, true>(score, exponent, group, level, s.scale);
      // Roundings of like rows all go one way, and would add up.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const near = score[0] + 2 * half;
        const float* const far = score[1] + 2 * half;
        const float part = ((near[0] + near[1]) + (far[0] + far[1])) - excess[half];
        const float next = sum[half] + part;
        excess[half] = (next - sum[half]) - part;
        sum[half] = next;
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

}  // namespace

int64_t received_attention_fwd_workspace(const ReceivedAttentionParams& p) {
  return p.scores.batch * p.scores.heads * p.scores.queries + cosine_factors_workspace(p.scores);
}

cudaError_t received_attention_fwd(const ReceivedAttentionParams& given, float* low,
                                   cudaStream_t stream) {
  ReceivedAttentionParams p = given;
  const AttentionScores& s = p.scores;
  if (s.batch * s.heads * s.keys == 0) {
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
    const StripTiling tiling =
        received_tiling(s.queries, s.keys, static_cast<int>(s.dim), sizeof(T));
    return launch(received_attention_kernel<T>, dim3(tiling.blocks(s.batch * s.heads)),
                  tiling.warps() * kWarp, tiling.shared_bytes, stream, p, low, tiling, shape,
                  aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)));
  });
}

}  // namespace mimkernels::cuda

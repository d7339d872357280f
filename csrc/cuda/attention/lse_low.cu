#include "cuda/attention/lse_low.h"

#include "cuda/attention/scores.cuh"

namespace mimkernels::cuda {
namespace {

// Blocks of a multiprocessor: fewer than shared memory has room for, where more would spill.
template <typename T>
constexpr int kLowBlocks = sizeof(T) == 4 ? 5 : 6;

// grid:     a warp owns a strip of 16 queries, strips of a head fastest, 4 warps a block
// in:       q, k by stride, features contiguous; lse fp32 [B, H, Nq] contiguous; bias by stride (0
//           where broadcast), table and index, key mask and factors, each or none
// out:      low fp32 [B, H, Nq] = log of the sum over keys of exp(S - lse), 0 where lse is not
//           large; contiguous, every element written once
// numerics: fp32, relative to the row's maximum of S - lse
// bounds:   keys beyond the last and masked keys count nothing, tails of queries are not stored
// cost:     nothing but lse is read where no row of the strip is large, else k once per strip; the
//           warp's queries and 16 keys in shared memory; no atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kLowWarps* kWarp, kLowBlocks<T>)
    lse_low_kernel(AttentionScores s, const float* lse, float* low, RowShape<T> shape,
                   bool q_aligned, bool k_aligned) {
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int strips = (queries + kStrip - 1) / kStrip;
  const int64_t index = blockIdx.x * int64_t{kLowWarps} + warp;
  const int head = static_cast<int>(index / strips);
  const int first = static_cast<int>(index % strips) * kStrip;
  if (head >= s.batch * s.heads) {
    return;
  }
  Level level[2];
  bool large[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int query = query_token<false>(first, 0, n);
    level[n] = {query < queries ? lse[head * s.queries + query] : 0.0f, 0.0f};
    large[n] = fabsf(level[n].lse) > kLargeLse && fabsf(level[n].lse) < kInfinity;
  }
  float top[2] = {-kInfinity, -kInfinity};
  float sum[2] = {};
  if (__any_sync(kWarpMask, large[0] || large[1])) {
    const int b = head / heads;
    const int h = head % heads;
    const HeadTerms terms(s, b, h);
    T* const q_rows = reinterpret_cast<T*>(shared_memory()) + warp * 2 * kStrip * shape.stride;
    T* const k_rows = q_rows + kStrip * shape.stride;
    load_rows(q_rows, shape.stride, shape.chunks, head_at<T>(s.q, b, h, first), s.q.stride_token,
              kStrip, queries - first, dim, q_aligned, lane, kWarp);
    for (int first_key = 0; first_key < keys; first_key += kStrip) {
      __syncwarp();
      load_rows(k_rows, shape.stride, shape.chunks, head_at<T>(s.k, b, h, first_key),
                s.k.stride_token, kStrip, keys - first_key, dim, k_aligned, lane, kWarp);
      copy_async_commit();
      copy_async_wait<0>();
      __syncwarp();
      float t[2][4];
      multiply_rows<T>(t, q_rows, k_rows, shape.stride, shape.steps);
      make_cosines<false>(t, terms, first, first_key);
      subtract_lse<false>(t, load_terms<T, false>(terms, first, first_key), level, s.scale);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float last = top[half];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          top[half] = fmaxf(top[half], t[i / 2][2 * half + i % 2]);
        }
        top[half] = max_quad(top[half]);
        const float base = top[half] == -kInfinity ? 0.0f : top[half];
        sum[half] *= expf(last - base);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[half] += expf(t[i / 2][2 * half + i % 2] - base);
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = add_quad(sum[half]);
    const int query = query_token<false>(first, 0, half);
    if (lane % 4 == 0 && query < queries) {
      low[head * s.queries + query] = large[half] && total > 0.0f ? top[half] + logf(total) : 0.0f;
    }
  }
}

template <typename T>
cudaError_t launch_lse_low(const AttentionScores& s, const float* lse, float* low,
                           cudaStream_t stream) {
  const RowShape<T> shape(s.dim);
  const int64_t strips = s.batch * s.heads * ((s.queries + kStrip - 1) / kStrip);
  if (strips == 0) {
    return cudaSuccess;
  }
  return launch(lse_low_kernel<T>,
                dim3(static_cast<unsigned>((strips + kLowWarps - 1) / kLowWarps)),
                kLowWarps * kWarp, low_shared_bytes(static_cast<int>(s.dim), sizeof(T)), stream, s,
                lse, low, shape, aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)));
}

}  // namespace

cudaError_t lse_low(const AttentionScores& s, const float* lse, float* low, cudaStream_t stream) {
  return with_float_type(
      s.dtype, [&](auto type) { return launch_lse_low<decltype(type)>(s, lse, low, stream); });
}

}  // namespace mimkernels::cuda

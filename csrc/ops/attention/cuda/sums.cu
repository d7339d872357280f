#include "ops/attention/cuda/sums.h"

#include "cuda/attention/tile.cuh"
#include "cuda/sums.cuh"

namespace mimkernels::cuda {
namespace {

constexpr int kChunkScores = 4 * kWarp;  // that a warp holds in shared memory
constexpr int kTableShared = kWarps * kChunkScores * 8;

// grid:     cdiv(T, 32), fastest, times H; a block owns 32 entries of one head, a lane of every warp
//           one of them
// in:       ds fp32 [H, Nq, Nk] contiguous, index [Nq, Nk] by stride
// out:      dtable [T, H] = the sum of ds over the scores that the entry was added to; contiguous,
//           every element written once
// numerics: fp32, compensated; a warp adds every eighth chunk of 128 scores, warps in order
// bounds:   indices outside the table have no entry; offsets are int64
// cost:     index is read cdiv(T, 32) * H times, ds only where a chunk has one of the block's
//           entries, which relative positions have in few; no atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_dtable_kernel(const float* ds, ScoreTable table, T* dtable, int heads, int64_t scores,
                            int keys, int entry_blocks) {
  constexpr unsigned kNone = ~0u;
  const unsigned lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int h = static_cast<int>(blockIdx.x) / entry_blocks;
  const int64_t first = static_cast<int>(blockIdx.x) % entry_blocks * int64_t{kWarp};
  unsigned* const entries = reinterpret_cast<unsigned*>(shared_memory()) + warp * 2 * kChunkScores;
  float* const values = reinterpret_cast<float*>(entries + kChunkScores);
  CompensatedSum sum;
  for (int64_t chunk = warp * int64_t{kChunkScores}; chunk < scores;
       chunk += kWarps * kChunkScores) {
    unsigned entry[4];  // among the block's
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = chunk + i * kWarp + lane;
      entry[i] = kNone;
      if (at < scores) {
        const int64_t from_first =
            table.index.data[at / keys * table.index.stride1 + at % keys] - first;
        entry[i] =
            from_first >= 0 && from_first < kWarp ? static_cast<unsigned>(from_first) : kNone;
      }
      any = any || entry[i] != kNone;
    }
    if (!__any_sync(kWarpMask, any)) {
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = chunk + i * kWarp + lane;
      entries[i * kWarp + lane] = entry[i];
      values[i * kWarp + lane] = entry[i] != kNone ? ds[h * scores + at] : 0.0f;
    }
    __syncwarp();
    float part = 0.0f;
#pragma unroll 4
    for (int i = 0; i < kChunkScores; i += 4) {
      const uint4 of = *reinterpret_cast<const uint4*>(entries + i);
      const float4 value = load_four(values + i);
      part += of.x == lane ? value.x : 0.0f;
      part += of.y == lane ? value.y : 0.0f;
      part += of.z == lane ? value.z : 0.0f;
      part += of.w == lane ? value.w : 0.0f;
    }
    sum.add(part);
    __syncwarp();
  }
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared_memory());
  sums[threadIdx.x] = sum.sum;
  sums[kThreads + threadIdx.x] = sum.lost;
  __syncthreads();
  if (warp == 0 && first + lane < table.entries) {
    for (int w = 1; w < kWarps; ++w) {
      sum.add({sums[w * kWarp + lane], sums[kThreads + w * kWarp + lane]});
    }
    dtable[(first + lane) * heads + h] = from_float<T>(sum.total());
  }
}

// grid:     H; a block owns a head
// in:       products fp32 [groups, H, tiles], logit_scale [H]
// out:      dlogit_scale fp32 [H], 0 where the scale is at its largest; every element written once
// numerics: fp32, compensated; a thread adds every 256th tile, threads in order
// bounds:   offsets are int64
// cost:     products read once; no atomics, deterministic
__global__ void __launch_bounds__(kThreads)
    logit_scale_gradient_kernel(const float* products, const float* logit_scale, float* out,
                                int64_t groups, int heads, int64_t tiles) {
  const int h = static_cast<int>(blockIdx.x);
  CompensatedSum sum;
  for (int64_t i = threadIdx.x; i < groups * tiles; i += kThreads) {
    sum.add(products[(i / tiles * heads + h) * tiles + i % tiles]);
  }
  float* const sums = reinterpret_cast<float*>(shared_memory());
  sums[threadIdx.x] = sum.sum;
  sums[kThreads + threadIdx.x] = sum.lost;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads; ++i) {
      sum.add({sums[i], sums[kThreads + i]});
    }
    out[h] = logit_scale[h] > kLargestLogitScale ? 0.0f : sum.total();
  }
}

}  // namespace

cudaError_t table_gradient(const AttentionBwdParams& p, const float* ds, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  const int entry_blocks = int_ceil_div(s.table.entries, kWarp);
  if (s.table.entries * s.heads == 0) {
    return cudaSuccess;
  }
  return with_float_type(s.table.dtype, [&](auto type) {
    using T = decltype(type);
    return launch(attention_dtable_kernel<T>, dim3(static_cast<unsigned>(entry_blocks * s.heads)),
                  kThreads, kTableShared, stream, ds, s.table, static_cast<T*>(p.dtable),
                  static_cast<int>(s.heads), s.queries * s.keys, static_cast<int>(s.keys),
                  entry_blocks);
  });
}

cudaError_t logit_scale_gradient(const AttentionBwdParams& p, const float* products, int64_t groups,
                                 int64_t tiles, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  if (s.heads == 0) {
    return cudaSuccess;
  }
  return launch(logit_scale_gradient_kernel, dim3(static_cast<unsigned>(s.heads)), kThreads,
                2 * kThreads * static_cast<int>(sizeof(float)), stream, products,
                s.cosine.logit_scale, p.dlogit_scale, groups, static_cast<int>(s.heads), tiles);
}

}  // namespace mimkernels::cuda

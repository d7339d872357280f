// Ranks of 32-bit keys, ties by index, by counting: what an argsort of an argsort gives, without
// the argsorts. Shared by random_mask and mask_from_noise.
#pragma once

#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace mimkernels::cuda {

// Sorts after every key, or beside the largest, but with a higher index.
constexpr uint32_t kPadding = 0xffffffffu;
constexpr int kMostThreads = 1024;
// Tokens that the kernels rank at most: one row of keys in 32 KiB of shared memory, compared with
// itself, beyond which a sort wins.
constexpr int64_t kMostRankedTokens = 8192;

struct MaskTensors {
  int64_t* ids_shuffle = nullptr;
  int64_t* ids_restore = nullptr;
  float* mask = nullptr;
};

// #{j : (keys[j], j) < (keys[i], i)} with i = first + lane. `padded` keys, a multiple of 32, as is
// `first`: of whole earlier warps those up to mine count, of later ones those below.
__device__ __forceinline__ int rank_in(const uint32_t* keys, int padded, int first, int lane) {
  const uint4* const quads = reinterpret_cast<const uint4*>(keys);
  const uint32_t mine = keys[first + lane];
  int rank = 0;
#pragma unroll 4
  for (int q = 0; q < first / 4; ++q) {
    const uint4 key = quads[q];
    rank += (key.x <= mine) + (key.y <= mine) + (key.z <= mine) + (key.w <= mine);
  }
  for (int j = 0; j < kWarp; ++j) {
    const uint32_t key = keys[first + j];
    rank += key < mine || (key == mine && j < lane);
  }
#pragma unroll 4
  for (int q = (first + kWarp) / 4; q < padded / 4; ++q) {
    const uint4 key = quads[q];
    rank += (key.x < mine) + (key.y < mine) + (key.z < mine) + (key.w < mine);
  }
  return rank;
}

// grid:     a block ranks one chunk of blockDim.x tokens against all tokens of its image, or, in
//           sorted order, all chunks one after the other; then loops
// in:       fill.keys(b, keys, padded) writes the keys of image b, the rest kPadding
// out:      ids_shuffle, ids_restore int64 and mask fp32 [B, N]; every element written exactly once
// numerics: integers
// bounds:   the tail of the tokens is masked; ranks lie in [0, N) by construction; offsets are
//           int64
// cost:     N^2 comparisons per image, four per 16-byte read of shared memory; keys made once per
//           chunk and never stored; 4 * (N + 31) bytes of shared memory and 128 more; no sort, no
//           atomics, deterministic
template <typename Fill>
__global__ void __launch_bounds__(kMostThreads)
    rank_kernel(Fill fill, MaskTensors out, int64_t batch, int tokens, int padded, int64_t keep,
                bool sorted) {
  uint32_t* const keys = reinterpret_cast<uint32_t*>(shared_memory());
  int* const kept_in_warp = reinterpret_cast<int*>(keys + padded);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int threads = static_cast<int>(blockDim.x);
  const int chunks = (tokens + threads - 1) / threads;
  const int chunks_per_item = sorted ? chunks : 1;
  const int items_per_image = sorted ? 1 : chunks;

  for (int64_t item = blockIdx.x; item < batch * items_per_image; item += gridDim.x) {
    int64_t part;
    const int64_t b = divide(item, items_per_image, part);
    fill.keys(b, keys, padded);
    __syncthreads();
    int kept_before_chunk = 0;
    for (int chunk = static_cast<int>(part); chunk < part + chunks_per_item; ++chunk) {
      const int first = chunk * threads + warp * kWarp;
      const int i = first + lane;
      const bool inside = i < tokens;
      int64_t place = first < padded ? rank_in(keys, padded, first, lane) : 0;
      const bool kept = inside && place < keep;
      if (sorted) {
        const unsigned warp_kept = __ballot_sync(kWarpMask, kept);
        if (lane == 0) {
          kept_in_warp[warp] = __popc(warp_kept);
        }
        __syncthreads();
        int kept_before = kept_before_chunk + __popc(warp_kept & ((1u << lane) - 1));
        for (int w = 0; w < threads / kWarp; ++w) {
          kept_before += w < warp ? kept_in_warp[w] : 0;
          kept_before_chunk += kept_in_warp[w];
        }
        __syncthreads();
        place = kept ? kept_before : keep + i - kept_before;
      }
      if (inside) {
        const int64_t row = b * tokens;
        out.mask[row + i] = kept ? 0.0f : 1.0f;
        out.ids_restore[row + i] = place;
        out.ids_shuffle[row + place] = i;
      }
    }
    __syncthreads();
  }
}

template <typename Params, typename Fill>
cudaError_t make_masks(const Params& p, const Fill& fill, cudaStream_t stream) {
  if (p.batch * p.tokens == 0) {
    return cudaSuccess;
  }
  if (p.tokens > kMostRankedTokens) {
    return cudaErrorInvalidValue;
  }
  const int tokens = static_cast<int>(p.tokens);
  const int padded = static_cast<int>(ceil_div(tokens, kWarp)) * kWarp;
  const int most = p.sorted ? kMostThreads : kThreads;
  const int threads = padded < most ? padded : most;
  const int64_t items = p.sorted ? p.batch : p.batch * ceil_div(tokens, threads);
  const int shared = padded * static_cast<int>(sizeof(uint32_t)) +
                     kMostThreads / kWarp * static_cast<int>(sizeof(int));
  const MaskTensors out = {p.ids_shuffle, p.ids_restore, p.mask};
  return launch(rank_kernel<Fill>, blocks_for(items, 1), threads, shared, stream, fill, out,
                p.batch, tokens, padded, p.keep, p.sorted);
}

}  // namespace mimkernels::cuda

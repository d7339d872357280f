#include "ops/masked_patch_loss/cuda.cuh"
#include "ops/masked_patch_loss/cuda_pixels.cuh"

namespace mimkernels::cuda {
namespace {

// The body of the kernels; kPixels: by_pixels(p).
template <typename T, int VEC, bool kPixels>
__device__ __forceinline__ void loss_of_patches(const MaskedPatchLossParams& p,
                                                const LossBlock& block, double* partial) {
  PixelRun* const runs = reinterpret_cast<PixelRun*>(shared_memory());
  float* const tiles = reinterpret_cast<float*>(runs + block.runs);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  make_runs(runs, p.images, block);
  __syncthreads();
  double sum = 0.0;
  double count = 0.0;
  for (int64_t i = int64_t{blockIdx.x} * block.warps + warp; i < block.patches;
       i += int64_t{gridDim.x} * block.warps) {
    int64_t j;
    const int64_t b = divide(i, p.length, j);
    CountedPatch patch;
    if constexpr (kPixels) {
      patch = counted_pixels(p, block, b, j);
    } else {
      patch.n = counted_patch(p, block, b, j);
    }
    const int64_t n = patch.n;
    float loss = 0.0f;
    if (n >= 0) {
      const PatchTarget target =
          kPixels ? read_pixel_target(p, block, runs, tiles, b, n)
                  : read_target(p, block, runs, tiles + int64_t{warp} * block.tile, b, n);
      const float share = sum_over_differences<T, VEC>(
          row_at<T>(p.pred, b, j), target, block.elements, [&](int v, const float (&d)[VEC]) {
            float part = 0.0f;
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
              if (kPixels && !element_counts(p, block, patch.cells, v * VEC + e)) {
                continue;
              }
              const float size = fabsf(d[e]);
              if (p.kind == LossKind::kMse) {
                part += d[e] * d[e];
              } else if (p.kind == LossKind::kL1) {
                part += size;
              } else {
                part += size < p.beta ? 0.5f * d[e] * d[e] / p.beta : size - 0.5f * p.beta;
              }
            }
            return part;
          });
      loss = warp_sum(share) / (kPixels ? counted_elements(p, block, patch.cells)
                                        : static_cast<float>(block.elements));
      sum += static_cast<double>(loss);
    }
    if (kPixels && p.cells_h > 0) {
      count += static_cast<double>(patch.cells.count);
    } else {
      count += n >= 0 || !p.mask.given ? 1.0 : 0.0;
    }
    if (!p.mean && lane == 0) {
      p.loss[i] = loss;
    }
  }
  if (p.mean) {
    double* const shared = reinterpret_cast<double*>(shared_memory());  // [warps, 2]
    __syncthreads();
    if (lane == 0) {
      shared[2 * warp] = sum;
      shared[2 * warp + 1] = count;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      double total = 0.0;
      for (int w = 0; w < block.warps; ++w) {
        total += shared[2 * w + threadIdx.x];
      }
      partial[2 * int64_t{blockIdx.x} + threadIdx.x] = total;
    }
  }
}

// grid:     a warp owns one row of pred, then loops; the block holds a table of the patch's runs of
//           pixels and a tile of E floats for each warp
// in:       pred [B, L, E], images [B, C, T, H, W], ids int64 [B, L] or mask bool [B, L] by stride,
//           last stride 1; scale and shift fp32 [C] or null
// out:      loss fp32 [B, L], 0 where the patch does not count; or partial [blocks, 2]: the sum and
//           the number of the block's losses, which of ids is that of all; every element written
//           exactly once
// numerics: target, statistics (variance about the mean, unbiased, + 1e-6) and sums over a patch in
//           fp32, lanes apart, 16 to 32 terms in a row, then by a tree; sums over patches in fp64,
//           in an order that depends on the shape alone
// bounds:   tails are masked; an id outside [0, N) has loss 0; offsets are int64
// cost:     counted rows of pred and their pixels read once, 4 independent loads in flight per
//           thread; shared memory 4 * E bytes a warp and the table; no atomics, deterministic
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 3)
    masked_patch_loss_fwd_kernel(MaskedPatchLossParams p, LossBlock block, double* partial) {
  loss_of_patches<T, VEC, false>(p, block, partial);
}

// As masked_patch_loss_fwd_kernel, and what differs from pixel to pixel:
// in:       mask may be bool [B, gh * cells_h, gw * cells_w] by strides
// out:      partial [blocks, 2]: the sum of the losses of true cells and their number
// numerics: sums over boxes in fp64, of columns and then of these
// cost:     with local_norm, of 2 x 16 pixels at a time those of their boxes; 1 KiB more a warp
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    masked_patch_loss_pixels_fwd_kernel(MaskedPatchLossParams p, LossBlock block, double* partial) {
  loss_of_patches<T, VEC, true>(p, block, partial);
}

// grid:     one block of 256 threads
// in:       partial fp64 [blocks, 2]
// out:      loss fp32 [1], the sum of the sums over the sum of the numbers; 0 / 0 is NaN
// numerics: fp64, threads apart, then by a tree; rounded once
// bounds:   the tail is masked
// cost:     partial read once; 128 bytes of shared memory; no atomics, deterministic
__global__ void __launch_bounds__(kThreads)
    mean_loss_kernel(const double* partial, int64_t blocks, float* loss) {
  constexpr int kWarps = kThreads / kWarp;
  double* const shared = reinterpret_cast<double*>(shared_memory());  // [2, 8]
  double sum = 0.0;
  double count = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum += partial[2 * i];
    count += partial[2 * i + 1];
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = sum;
    shared[kWarps + threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      sum += shared[w];
      count += shared[kWarps + w];
    }
    loss[0] = static_cast<float>(sum / count);
  }
}

int64_t blocks_of(const LossBlock& block) {
  return block.patches == 0 ? 0 : blocks_for(block.patches, block.warps);
}

}  // namespace

int64_t masked_patch_loss_fwd_workspace(const MaskedPatchLossParams& p) {
  return p.mean ? 2 * blocks_of(loss_block(p)) : 0;
}

cudaError_t masked_patch_loss_fwd(const MaskedPatchLossParams& p, double* workspace,
                                  cudaStream_t stream) {
  const LossBlock block = loss_block(p);
  if (!fits(block.layout) || !fits_pixels(p, block)) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = blocks_of(block);
  if (blocks > 0) {
    const cudaError_t error = with_float_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      constexpr int kVec = 16 / sizeof(T);
      const bool aligned = pred_aligned(p, block);
      const auto plain =
          aligned ? masked_patch_loss_fwd_kernel<T, kVec> : masked_patch_loss_fwd_kernel<T, 1>;
      const auto pixels = aligned ? masked_patch_loss_pixels_fwd_kernel<T, kVec>
                                  : masked_patch_loss_pixels_fwd_kernel<T, 1>;
      const auto kernel = by_pixels(p) ? pixels : plain;
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), block.threads(),
                    block.shared_bytes(), stream, p, block, workspace);
    });
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (!p.mean) {
    return cudaSuccess;
  }
  constexpr int kShared = 2 * kThreads / kWarp * static_cast<int>(sizeof(double));
  return launch(mean_loss_kernel, dim3(1), kThreads, kShared, stream, workspace, blocks, p.loss);
}

}  // namespace mimkernels::cuda

#include "ops/masked_patch_loss/cuda.cuh"
#include "ops/masked_patch_loss/cuda_pixels.cuh"

namespace mimkernels::cuda {
namespace {

// Blocks that count the patches: one number for each lane of a warp to add.
constexpr int kCountBlocks = kWarp;

// grid:     32 blocks of 256 threads, which loop
// in:       mask bool [B, rows, columns] by strides, last stride 1; [B, L] has one row
// out:      counts int64 [32]: how many patches, or cells of patches, count, each block's part
// numerics: integers
// bounds:   the tail is masked; offsets are int64
// cost:     mask read once; 64 bytes of shared memory; no atomics, deterministic
__global__ void __launch_bounds__(kThreads)
    count_patches_kernel(BoolMask mask, int64_t stride_row, int64_t rows, int64_t columns,
                         int64_t total, int64_t* counts) {
  int64_t* const shared = reinterpret_cast<int64_t*>(shared_memory());  // [8]
  int64_t count = 0;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total;
       i += gridDim.x * int64_t{kThreads}) {
    int64_t column;
    int64_t row;
    const int64_t line = divide(i, columns, column);
    const int64_t b = divide(line, rows, row);
    count += __ldg(mask.data + b * mask.stride0 + row * stride_row + column) != 0;
  }
  count = warp_sum(count);
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) {
      count += shared[w];
    }
    counts[blockIdx.x] = count;
  }
}

// The body of the kernels; kPixels: by_pixels(p).
template <typename T, int VEC, bool kPixels>
__device__ __forceinline__ void grad_of_patches(const MaskedPatchLossParams& p,
                                                const LossBlock& block, const int64_t* counts) {
  PixelRun* const runs = reinterpret_cast<PixelRun*>(shared_memory());
  float* const tiles = reinterpret_cast<float*>(runs + block.runs);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  make_runs(runs, p.images, block);
  __syncthreads();
  float divisor = 1.0f;
  if (p.mean) {
    divisor =
        static_cast<float>(counts == nullptr ? block.patches : warp_sum(__ldg(counts + lane)));
  }
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
    Word<T, VEC>* const out =
        reinterpret_cast<Word<T, VEC>*>(static_cast<T*>(p.dpred) + i * block.elements);
    if (n < 0) {
      for (int v = lane; v < block.elements / VEC; v += kWarp) {
        out[v] = Word<T, VEC>{};
      }
      continue;
    }
    const PatchTarget target =
        kPixels ? read_pixel_target(p, block, runs, tiles, b, n)
                : read_target(p, block, runs, tiles + int64_t{warp} * block.tile, b, n);
    const float upstream =
        __ldg(p.grad + (p.mean ? 0 : b * p.grad_strides[0] + j * p.grad_strides[1]));
    const float grad =
        upstream / divisor /
        (kPixels ? counted_elements(p, block, patch.cells) : static_cast<float>(block.elements));
    sum_over_differences<T, VEC>(
        row_at<T>(p.pred, b, j), target, block.elements, [&](int v, float (&d)[VEC]) {
#pragma unroll
          for (int e = 0; e < VEC; ++e) {
            // A NaN difference has sign 0, as in torch.
            const float sign = d[e] > 0.0f ? 1.0f : d[e] < 0.0f ? -1.0f : 0.0f;
            float slope = sign;
            if (p.kind == LossKind::kMse) {
              slope = 2.0f * d[e];
            } else if (p.kind == LossKind::kSmoothL1 && !(fabsf(d[e]) >= p.beta)) {
              slope = d[e] / p.beta;
            }
            const bool counted = !kPixels || element_counts(p, block, patch.cells, v * VEC + e);
            d[e] = counted ? slope * grad : 0.0f;
          }
          out[v] = pack<T, VEC>(d);
          return 0.0f;
        });
  }
}

// grid:     a warp owns one row of dpred, then loops; shared memory as in the forward
// in:       as in the forward; grad fp32, one number or [B, L] by stride; counts int64 [32], whose
//           sum a mean was taken over, or null for all patches
// out:      dpred [B, L, E] contiguous, zero where the patch does not count; every element written
//           exactly once
// numerics: the target as in the forward; fp32, rounded once
// bounds:   as in the forward
// cost:     counted rows of pred and their pixels read once, dpred written once, 4 independent
//           loads in flight per thread; no atomics, deterministic
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 3)
    masked_patch_loss_bwd_kernel(MaskedPatchLossParams p, LossBlock block, const int64_t* counts) {
  grad_of_patches<T, VEC, false>(p, block, counts);
}

// As masked_patch_loss_bwd_kernel, and what differs from pixel to pixel, as in
// masked_patch_loss_pixels_fwd_kernel: dpred is zero where its cell does not count.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    masked_patch_loss_pixels_bwd_kernel(MaskedPatchLossParams p, LossBlock block,
                                        const int64_t* counts) {
  grad_of_patches<T, VEC, true>(p, block, counts);
}

}  // namespace

int64_t masked_patch_loss_bwd_workspace(const MaskedPatchLossParams& p) {
  return p.mean && p.mask.given ? kCountBlocks : 0;
}

cudaError_t masked_patch_loss_bwd(const MaskedPatchLossParams& p, int64_t* workspace,
                                  cudaStream_t stream) {
  const LossBlock block = loss_block(p);
  if (block.patches * block.layout.elements == 0) {
    return cudaSuccess;
  }
  if (!fits(block.layout) || !fits_pixels(p, block)) {
    return cudaErrorInvalidValue;
  }
  const int64_t* counts = nullptr;
  if (p.mean && p.mask.given) {
    constexpr int kShared = kThreads / kWarp * static_cast<int>(sizeof(int64_t));
    const bool cells = p.cells_h > 0;
    const int64_t rows = cells ? block.layout.grid_h * p.cells_h : 1;
    const int64_t columns = cells ? block.layout.grid_w * p.cells_w : p.length;
    const cudaError_t error =
        launch(count_patches_kernel, dim3(kCountBlocks), kThreads, kShared, stream, p.mask,
               p.mask_stride_row, rows, columns, p.grid.batch * rows * columns, workspace);
    if (error != cudaSuccess) {
      return error;
    }
    counts = workspace;
  }
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = 16 / sizeof(T);
    const bool aligned = pred_aligned(p, block);
    const auto plain =
        aligned ? masked_patch_loss_bwd_kernel<T, kVec> : masked_patch_loss_bwd_kernel<T, 1>;
    const auto pixels = aligned ? masked_patch_loss_pixels_bwd_kernel<T, kVec>
                                : masked_patch_loss_pixels_bwd_kernel<T, 1>;
    const auto kernel = by_pixels(p) ? pixels : plain;
    return launch(kernel, dim3(blocks_for(block.patches, block.warps)), block.threads(),
                  block.shared_bytes(), stream, p, block, counts);
  });
}

}  // namespace mimkernels::cuda

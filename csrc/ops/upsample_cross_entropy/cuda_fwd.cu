#include "cuda/sums.cuh"
#include "ops/upsample_cross_entropy/cuda.cuh"
#include "ops/upsample_cross_entropy/cuda.h"

namespace mimkernels::cuda {
namespace {

// Classes that are summed in a row; then these sums are.
constexpr int64_t kClasses = 16;

// The sums of x and y over the block, in thread 0; `shared` holds two doubles per warp.
__device__ __forceinline__ void sum_block(double& x, double& y, double* shared) {
  x = warp_sum(x);
  y = warp_sum(y);
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = x;
    shared[kWarps + threadIdx.x / kWarp] = y;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      x += shared[w];
      y += shared[kWarps + w];
    }
  }
}

// grid:     blocks of 256 threads; a thread owns a label pixel, then loops
// in:       logits [B, C, h, w] and labels int64 [B, H, W] by strides, last stride 1; weight fp32
//           [C] or null
// out:      statistics fp32 [2, B, H, W]: the largest logit and the sum of exp(logit - largest), 0
//           where the label is ignored; partial [blocks, 2]: the sums of the block's losses and of
//           the weights of their labels; every element written exactly once
// numerics: places in whole numbers; logits and the softmax, about the largest so far, in fp32; what
//           is smoothed relative to the label's logit; sums over pixels in fp64, in an order that
//           depends on the shape alone
// bounds:   the tail of pixels is masked; labels that are no class are ignored; offsets are int64
// cost:     4 loads and one exponential per class and pixel; a warp's loads lie in a few sectors,
//           and all of a row of labels in two rows of logits; 128 bytes of shared memory; no
//           atomics, deterministic
template <typename T, bool SMOOTH>
__global__ void __launch_bounds__(kThreads)
    upsample_cross_entropy_fwd_kernel(UpsampleCrossEntropyParams p, Places rows, Places columns,
                                      double* partial) {
  const int64_t pixels = p.batch * p.height * p.width;
  double loss_sum = 0.0;
  double weight_sum = 0.0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pixels;
       i += int64_t{gridDim.x} * kThreads) {
    int64_t x;
    int64_t y;
    const int64_t b = divide(divide(i, p.width, x), p.height, y);
    const int64_t label = label_at(p, b, y, x);
    float largest = 0.0f;
    float sum = 0.0f;
    if (counts(p, label)) {
      const Taps taps = taps_of(p, cell_of(rows, y), cell_of(columns, x));
      const float down = second_weight(rows, y);
      const float along = second_weight(columns, x);
      const T* const planes = first_plane<T>(p, b);
      const float own = mixed_logit(planes + label * p.logits_strides[1], taps, down, along);
      CompensatedSum spread;
      CompensatedSum weights;
      largest = -3.402823466e38f;  // so that logits of -inf lie below it
      for (int64_t start = 0; start < p.classes; start += kClasses) {
        const int64_t end = min(start + kClasses, p.classes);
        float part = 0.0f;
        for (int64_t c = start; c < end; ++c) {
          const float z = mixed_logit(planes + c * p.logits_strides[1], taps, down, along);
          const float e = exp2_fast(-fabsf(z - largest) * kLog2E);
          if (z > largest) {
            sum *= e;
            part = part * e + 1.0f;
            largest = z;
          } else {
            part += e;
          }
          if (SMOOTH) {
            const float weight = weight_of(p, c);
            spread.add(weight * (z - own));
            weights.add(weight);
          }
        }
        sum += part;
      }
      const float weight = weight_of(p, label);
      const float hard = (largest - own) + logf(sum);
      float loss = weight * hard;
      if (SMOOTH) {
        loss = (1.0f - p.smoothing) * loss + p.smoothing / static_cast<float>(p.classes) *
                                                 (weights.total() * hard - spread.total());
      }
      loss_sum += static_cast<double>(loss);
      weight_sum += static_cast<double>(weight);
    }
    p.statistics[i] = largest;
    p.statistics[pixels + i] = sum;
  }
  sum_block(loss_sum, weight_sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) {
    partial[2 * int64_t{blockIdx.x}] = loss_sum;
    partial[2 * int64_t{blockIdx.x} + 1] = weight_sum;
  }
}

// grid:     one block of 256 threads
// in:       partial fp64 [blocks, 2]; weight fp32 [C] or null
// out:      loss fp32 [1], the sum of the losses over that of the weights, 0 / 0 is NaN; totals fp32
//           [2]: the latter, and the sum of weight
// numerics: fp64, threads apart, then by a tree; rounded once
// bounds:   the tails are masked
// cost:     partial and weight read once; 128 bytes of shared memory; no atomics, deterministic
__global__ void __launch_bounds__(kThreads)
    upsampled_mean_kernel(UpsampleCrossEntropyParams p, const double* partial, int64_t blocks) {
  double* const shared = reinterpret_cast<double*>(shared_memory());
  double loss = 0.0;
  double weight = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    loss += partial[2 * i];
    weight += partial[2 * i + 1];
  }
  sum_block(loss, weight, shared);
  double classes = 0.0;
  double unused = 0.0;
  for (int64_t c = threadIdx.x; c < p.classes; c += kThreads) {
    classes += static_cast<double>(weight_of(p, c));
  }
  __syncthreads();
  sum_block(classes, unused, shared);
  if (threadIdx.x == 0) {
    p.loss[0] = static_cast<float>(loss / weight);
    p.totals[0] = static_cast<float>(weight);
    p.totals[1] = static_cast<float>(classes);
  }
}

int64_t pixel_blocks(const UpsampleCrossEntropyParams& p) {
  const int64_t pixels = p.batch * p.height * p.width;
  return pixels == 0 ? 0 : blocks_for(pixels, kThreads);
}

}  // namespace

int64_t upsample_cross_entropy_fwd_workspace(const UpsampleCrossEntropyParams& p) {
  return 2 * pixel_blocks(p);
}

cudaError_t upsample_cross_entropy_fwd(const UpsampleCrossEntropyParams& p, double* workspace,
                                       cudaStream_t stream) {
  constexpr int kShared = 2 * kThreads / kWarp * static_cast<int>(sizeof(double));
  const int64_t blocks = pixel_blocks(p);
  if (blocks > 0) {
    const cudaError_t error = with_float_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      const auto kernel = p.smoothing > 0.0f ? upsample_cross_entropy_fwd_kernel<T, true>
                                             : upsample_cross_entropy_fwd_kernel<T, false>;
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, kShared, stream, p,
                    places_of(p.source_h, p.height, p.align_corners),
                    places_of(p.source_w, p.width, p.align_corners), workspace);
    });
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch(upsampled_mean_kernel, dim3(1), kThreads, kShared, stream, p, workspace, blocks);
}

}  // namespace mimkernels::cuda

#include "ops/upsample_cross_entropy/cuda.cuh"
#include "ops/upsample_cross_entropy/cuda.h"

namespace mimkernels::cuda {
namespace {

// A label pixel of a cell. One that does not count has scale, hard and share 0 and no label.
struct CellPixel {
  float down;     // the weight of the second row of logits
  float along;    // of the second column
  float largest;  // logit
  float scale;    // of exp(logit - largest)
  float hard;     // what its label's class loses
  float share;    // what every class loses, times its weight
  int64_t label;
};

__device__ __forceinline__ CellPixel read_pixel(const UpsampleCrossEntropyParams& p,
                                                const Places& rows, const Places& columns,
                                                int64_t b, int64_t y, int64_t x, float grad) {
  const int64_t label = label_at(p, b, y, x);
  CellPixel pixel = {second_weight(rows, y), second_weight(columns, x), 0, 0, 0, 0, -1};
  if (counts(p, label)) {
    const int64_t at = (b * p.height + y) * p.width + x;
    const float sum = p.statistics[p.batch * p.height * p.width + at];
    pixel.largest = p.statistics[at];
    pixel.hard = grad * (1.0f - p.smoothing) * weight_of(p, label);
    pixel.share = grad * p.smoothing / static_cast<float>(p.classes);
    pixel.scale = (pixel.hard + pixel.share * p.totals[1]) / sum;
    pixel.label = label;
  }
  return pixel;
}

// grid:     blocks of 32 to 256 threads; a block owns as many classes of a cell, the label pixels
//           between four logits, a thread one of them; then loops
// in:       logits [B, C, h, w] and labels int64 [B, H, W] by strides, last stride 1; statistics
//           and totals of the forward; weight fp32 [C] or null; grad fp32 [1]
// out:      parts fp32 [B, h, w, 4, C]: what the cell's pixels give to its upper left, upper right,
//           lower left and lower right logit; every element written exactly once. In the last row
//           and column, where two of these are one logit, the first has both
// numerics: fp32; sums over as many pixels as the block has threads, then over these
// bounds:   the tails of pixels and classes are masked; pixels that are ignored have factors of 0;
//           offsets are int64
// cost:     logits read 4 times, parts written once; one exponential per class and label pixel; 32
//           bytes of shared memory per thread; no atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    upsample_cross_entropy_bwd_kernel(UpsampleCrossEntropyParams p, Places rows, Places columns,
                                      int64_t chunks, float* parts) {
  CellPixel* const pixels = reinterpret_cast<CellPixel*>(shared_memory());
  const float grad = p.grad[0] / p.totals[0];
  const int64_t items = p.batch * p.source_h * p.source_w * chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t chunk;
    int64_t column;
    int64_t row;
    const int64_t cell = divide(item, chunks, chunk);
    const int64_t b = divide(divide(cell, p.source_w, column), p.source_h, row);
    const int64_t c = chunk * blockDim.x + threadIdx.x;
    const int64_t top = first_of_cell(rows, row);
    const int64_t left = first_of_cell(columns, column);
    const int64_t width = first_of_cell(columns, column + 1) - left;
    const int64_t count = (first_of_cell(rows, row + 1) - top) * width;
    float logits[4] = {};
    if (c < p.classes && count > 0) {
      const Taps taps = taps_of(p, row, column);
      const T* const plane = first_plane<T>(p, b) + c * p.logits_strides[1];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        logits[t] = to_float(plane[taps.at[t]]);
      }
    }
    const float weight = c < p.classes && p.smoothing > 0.0f ? weight_of(p, c) : 0.0f;
    float totals[4] = {};
    for (int64_t start = 0; start < count; start += blockDim.x) {
      __syncthreads();
      if (start + threadIdx.x < count) {
        int64_t x;
        const int64_t y = divide(start + threadIdx.x, width, x);
        pixels[threadIdx.x] = read_pixel(p, rows, columns, b, top + y, left + x, grad);
      }
      __syncthreads();
      const int here = static_cast<int>(min(int64_t{blockDim.x}, count - start));
      float sums[4] = {};
      for (int i = 0; i < here; ++i) {
        const CellPixel pixel = pixels[i];
        if (pixel.label < 0) {
          continue;
        }
        const float z = between(between(logits[0], logits[1], pixel.along),
                                between(logits[2], logits[3], pixel.along), pixel.down);
        float slope = exp2_fast((z - pixel.largest) * kLog2E) * pixel.scale - pixel.share * weight;
        slope -= pixel.label == c ? pixel.hard : 0.0f;
        const float lower = pixel.down * slope;
        const float upper = slope - lower;
        sums[1] += pixel.along * upper;
        sums[0] += upper - pixel.along * upper;
        sums[3] += pixel.along * lower;
        sums[2] += lower - pixel.along * lower;
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        totals[t] += sums[t];
      }
    }
    if (column + 1 == p.source_w) {
      totals[0] += totals[1];
      totals[2] += totals[3];
      totals[1] = totals[3] = 0.0f;
    }
    if (row + 1 == p.source_h) {
      totals[0] += totals[2];
      totals[1] += totals[3];
      totals[2] = totals[3] = 0.0f;
    }
    if (c < p.classes) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        parts[(cell * 4 + t) * p.classes + c] = totals[t];
      }
    }
  }
}

// grid:     blocks of 256 threads; a thread owns an element of dlogits, then loops
// in:       parts fp32 [B, h, w, 4, C]
// out:      dlogits [B, C, h, w] contiguous: the sum of what the four cells around a logit gave;
//           every element written exactly once
// numerics: fp32, rounded once
// bounds:   cells before the first row or column are none; offsets are int64
// cost:     parts read once, 4 bytes of a sector at a time, from the cache; no shared memory, no
//           atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_of_cells_kernel(UpsampleCrossEntropyParams p, const float* parts) {
  const int64_t elements = p.batch * p.classes * p.source_h * p.source_w;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kThreads) {
    int64_t column;
    int64_t row;
    int64_t c;
    const int64_t b = divide(divide(divide(i, p.source_w, column), p.source_h, row), p.classes, c);
    const int64_t cell = (b * p.source_h + row) * p.source_w + column;
    const float* const own = parts + cell * 4 * p.classes + c;
    float sum = own[0];
    if (column > 0) {
      sum += own[-3 * p.classes];
    }
    if (row > 0) {
      const float* const above = own - p.source_w * 4 * p.classes;
      sum += above[2 * p.classes];
      if (column > 0) {
        sum += above[-p.classes];
      }
    }
    static_cast<T*>(p.dlogits)[i] = from_float<T>(sum);
  }
}

}  // namespace

int64_t upsample_cross_entropy_bwd_workspace(const UpsampleCrossEntropyParams& p) {
  return 4 * p.batch * p.classes * p.source_h * p.source_w;
}

cudaError_t upsample_cross_entropy_bwd(const UpsampleCrossEntropyParams& p, float* workspace,
                                       cudaStream_t stream) {
  if (p.batch == 0) {
    return cudaSuccess;
  }
  const int64_t threads = p.classes < kThreads ? ceil_div(p.classes, kWarp) * kWarp : kThreads;
  const int64_t chunks = ceil_div(p.classes, threads);
  const int64_t cells = p.batch * p.source_h * p.source_w;
  const int shared = static_cast<int>(threads) * static_cast<int>(sizeof(CellPixel));
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const cudaError_t error =
        launch(upsample_cross_entropy_bwd_kernel<T>, blocks_for(cells * chunks, 1),
               static_cast<int>(threads), shared, stream, p,
               places_of(p.source_h, p.height, p.align_corners),
               places_of(p.source_w, p.width, p.align_corners), chunks, workspace);
    if (error != cudaSuccess) {
      return error;
    }
    return launch(sum_of_cells_kernel<T>, blocks_for(cells * p.classes, kThreads), kThreads, 0,
                  stream, p, workspace);
  });
}

}  // namespace mimkernels::cuda

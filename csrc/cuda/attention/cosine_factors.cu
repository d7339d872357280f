#include "cuda/attention/cosine_factors.h"

#include "cuda/attention/tile.cuh"

namespace mimkernels::cuda {
namespace {

constexpr int kLanes = 8;  // that share a row
constexpr int kRowThreads = 256;
constexpr int kRows = kRowThreads / kLanes;

// Squares of 16-bit elements are exact in fp32, and their sum loses little; of fp32 elements it is
// what a score of 100 would feel.
template <typename T>
using SquareSum = std::conditional_t<kExact<T>, double, float>;

// grid:     cdiv(B * H * N, 32); 8 lanes own a row of q or k
// in:       x [B, H, N, D] by stride, features contiguous; logit_scale fp32 [H], or null for keys
// out:      fp32 [B, H, N] = scale * exp(min(logit_scale, ln 100)) / max(|x|, 1e-12), for keys
//           1 / max(|x|, 1e-12); contiguous, every element written once
// numerics: rounded to fp32 once, but for the sum of squares of 16-bit elements
// bounds:   tails are not stored; offsets are int64
// cost:     x read once; no atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    cosine_factors_kernel(HeadRows x, const float* logit_scale, double scale, float* out,
                          int64_t rows, int heads, int tokens, int dim, bool aligned) {
  const int lane = threadIdx.x % kLanes;
  const int64_t index = blockIdx.x * int64_t{kRows} + threadIdx.x / kLanes;
  SquareSum<T> sum = 0;
  const int head = static_cast<int>(index < rows ? index / tokens : 0);
  if (index < rows) {
    const T* const row =
        head_at<T>(x, head / heads, head % heads, static_cast<int>(index % tokens));
    for (int chunk = lane; chunk * kChunk<T> < dim; chunk += kLanes) {
      const T* const from = row + chunk * kChunk<T>;
      T elements[kChunk<T>];
      load_chunk(elements, from, aligned);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const SquareSum<T> element = to_float(elements[e]);
        sum += element * element;
      }
    }
  }
  // The sum's two parts in fp32: it is shared by 8 lanes.
  const float high = static_cast<float>(sum);
  const float low = static_cast<float>(sum - high);
  double square = 0.0;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const int from = static_cast<int>(threadIdx.x) % kWarp / kLanes * kLanes + i;
    const float of_high = __shfl_sync(kWarpMask, high, from);
    const float of_low = __shfl_sync(kWarpMask, low, from);
    square += static_cast<double>(of_high) + static_cast<double>(of_low);
  }
  if (lane == 0 && index < rows) {
    double factor = scale;
    if (logit_scale != nullptr) {
      const double logit = logit_scale[head % heads];
      factor *= exp(logit > kLargestLogitScale ? kLargestLogitScale : logit);
    }
    const double length = sqrt(square);
    out[index] = static_cast<float>(factor / (length < kLeastLength ? kLeastLength : length));
  }
}

template <typename T>
cudaError_t launch_factors(const AttentionScores& s, const HeadRows& x, int64_t tokens,
                           const float* logit_scale, double scale, float* out,
                           cudaStream_t stream) {
  const int64_t rows = s.batch * s.heads * tokens;
  if (rows == 0) {
    return cudaSuccess;
  }
  return launch(cosine_factors_kernel<T>, dim3(static_cast<unsigned>((rows + kRows - 1) / kRows)),
                kRowThreads, 0, stream, x, logit_scale, scale, out, rows, static_cast<int>(s.heads),
                static_cast<int>(tokens), static_cast<int>(s.dim), aligned_rows(x, sizeof(T)));
}

}  // namespace

cudaError_t cosine_factors(AttentionScores& s, float* workspace, cudaStream_t stream) {
  if (!s.cosine.given) {
    return cudaSuccess;
  }
  float* const columns = workspace + s.batch * s.heads * s.queries;
  const double scale = s.scale;
  s.scale = 1.0f;
  s.cosine.rows = workspace;
  s.cosine.columns = columns;
  s.cosine.column_stride = s.keys;
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const cudaError_t error =
        launch_factors<T>(s, s.q, s.queries, s.cosine.logit_scale, scale, workspace, stream);
    return error != cudaSuccess ? error
                                : launch_factors<T>(s, s.k, s.keys, nullptr, 1.0, columns, stream);
  });
}

}  // namespace mimkernels::cuda

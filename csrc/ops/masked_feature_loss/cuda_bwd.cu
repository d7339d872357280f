#include "ops/masked_feature_loss/cuda.cuh"

namespace mimkernels::cuda {
namespace {

// grid:     blocks of 256 threads; a warp owns one row of dpred, then loops
// in:       as in the forward; grad fp32, one number or [A, R] by stride
// out:      dpred [A, R, D] contiguous, zero where the id names no token; every element written
//           exactly once
// numerics: the target as in the forward; fp32, rounded once
// bounds:   tails are masked; offsets are int64
// cost:     as in the forward, and dpred written once; no shared memory, no atomics, deterministic
template <typename T, typename U, int VEC>
__global__ void __launch_bounds__(kThreads, 3)
    masked_feature_loss_bwd_kernel(MaskedFeatureLossParams p, int64_t rows) {
  const int lane = threadIdx.x % kWarp;
  const int words = static_cast<int>(p.dim / VEC);
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < rows;
       i += int64_t{gridDim.x} * kWarps) {
    Word<T, VEC>* const out = reinterpret_cast<Word<T, VEC>*>(static_cast<T*>(p.dpred) + i * p.dim);
    TokenPlace place;
    if (!find_target(p, i, place)) {
      for (int v = lane; v < words; v += kWarp) {
        out[v] = Word<T, VEC>{};
      }
      continue;
    }
    int64_t j;
    const int64_t a = divide(i, p.length, j);
    const float grad = p.mean ? __ldg(p.grad) / static_cast<float>(rows)
                              : __ldg(p.grad + a * p.grad_strides[0] + j * p.grad_strides[1]);
    const T* const pred = row_at<T>(p.pred, a, j);
    const U* const target = row_at<U>(p.target, place.image, place.token);
    const RowNormal normal = normal_of<U, VEC>(p, target, words);
    if (p.kind == FeatureLossKind::kCosine) {
      const Products of = products_of<T, U, VEC>(pred, target, words, normal);
      const float inverse = inverse_length(of.pred_pred);
      const float across = inverse * inverse_length(of.target_target);
      const bool clamped = of.pred_pred < kLeastSquare;  // then the length is a constant
      const float along = clamped ? 0.0f : of.pred_target * across * inverse * inverse;
      for_each_pair<T, U, VEC>(pred, target, words, normal,
                               [&](int v, float (&x)[VEC], const float (&t)[VEC]) {
#pragma unroll
                                 for (int e = 0; e < VEC; ++e) {
                                   x[e] = x[e] * (grad * along) - t[e] * (grad * across);
                                 }
                                 out[v] = pack<T, VEC>(x);
                               });
      continue;
    }
    const float share = grad / static_cast<float>(p.dim);
    const float g = p.kind == FeatureLossKind::kSmoothL1 ? share / p.beta : share;
    for_each_pair<T, U, VEC>(pred, target, words, normal,
                             [&](int v, float (&x)[VEC], const float (&t)[VEC]) {
#pragma unroll
                               for (int e = 0; e < VEC; ++e) {
                                 const float d = x[e] - t[e];
                                 if (p.kind == FeatureLossKind::kMse) {
                                   x[e] = 2.0f * d * g;
                                 } else if (p.kind == FeatureLossKind::kL1) {
                                   // A NaN difference has sign 0, as in torch.
                                   x[e] = d > 0.0f ? g : d < 0.0f ? -g : 0.0f;
                                 } else {
                                   x[e] = (d > p.beta ? p.beta : d < -p.beta ? -p.beta : d) * g;
                                 }
                               }
                               out[v] = pack<T, VEC>(x);
                             });
  }
}

}  // namespace

cudaError_t masked_feature_loss_bwd(const MaskedFeatureLossParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.length;
  if (rows * p.dim == 0) {
    return cudaSuccess;
  }
  if (!fits(p)) {
    return cudaErrorInvalidValue;
  }
  return with_feature_types(p, [&](auto pred, auto target, auto vec) {
    return launch(
        masked_feature_loss_bwd_kernel<decltype(pred), decltype(target), decltype(vec)::value>,
        blocks_for(rows, kWarps), kThreads, 0, stream, p, rows);
  });
}

}  // namespace mimkernels::cuda

#include "cuda/rows.cuh"
#include "ops/gather_tokens/cuda.h"

namespace mimkernels::cuda {
namespace {

// in:       x [B, N, D], pos [N, D], prefix [P, D] by stride; ids int64 [M, B, K] by stride
// out:      [M * B, P + K, D]
// bounds:   an id outside [0, N) reads as zeros
// rest:     see write_rows_kernel
struct GatheredRows {
  static constexpr bool kMayAdd = true;
  GatherTokensFwdParams p;

  template <typename T>
  __device__ __forceinline__ RowSource<T> source(int64_t row) const {
    int64_t j, b;
    const int64_t m = divide(divide(row, p.num_prefix + p.kept, j), p.batch, b);
    if (j < p.num_prefix) {
      return {row_at<T>(p.prefix, 0, j), nullptr};
    }
    const int64_t id = __ldg(p.ids.data + m * p.ids.stride0 + b * p.ids.stride1 + j - p.num_prefix);
    if (id < 0 || id >= p.tokens) {
      return {};
    }
    return {row_at<T>(p.x, b, id), p.pos.given ? row_at<T>(p.pos, 0, id) : nullptr};
  }
};

}  // namespace

cudaError_t gather_tokens_fwd(const GatherTokensFwdParams& p, cudaStream_t stream) {
  const bool aligned = rows_aligned({p.out, 0, 0}, p.dim, p.dtype) &&
                       rows_aligned(p.x, p.dim, p.dtype) && rows_aligned(p.pos, p.dim, p.dtype) &&
                       rows_aligned(p.prefix, p.dim, p.dtype);
  return write_rows(GatheredRows{p}, p.dtype, p.pos.given, aligned, p.out,
                    p.masks * p.batch * (p.num_prefix + p.kept), p.dim, stream);
}

}  // namespace mimkernels::cuda

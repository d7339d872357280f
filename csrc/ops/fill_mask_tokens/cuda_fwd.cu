#include "cuda/rows.cuh"
#include "ops/fill_mask_tokens/cuda.h"

namespace mimkernels::cuda {
namespace {

// in:       x [B, N, D] and mask bool [B, N] by stride; mask_token [D]
// out:      [B, N, D]
// rest:     see write_rows_kernel
struct FilledRows {
  static constexpr bool kMayAdd = false;
  FillMaskTokensFwdParams p;

  template <typename T>
  __device__ __forceinline__ RowSource<T> source(int64_t row) const {
    int64_t n;
    const int64_t b = divide(row, p.tokens, n);
    const bool masked = __ldg(p.mask.data + b * p.mask.stride0 + n) != 0;
    return {masked ? static_cast<const T*>(p.mask_token) : row_at<T>(p.x, b, n), nullptr};
  }
};

}  // namespace

cudaError_t fill_mask_tokens_fwd(const FillMaskTokensFwdParams& p, cudaStream_t stream) {
  const bool aligned = rows_aligned({p.out, 0, 0}, p.dim, p.dtype) &&
                       rows_aligned(p.x, p.dim, p.dtype) &&
                       rows_aligned({p.mask_token, 0, 0}, p.dim, p.dtype);
  return write_rows(FilledRows{p}, p.dtype, false, aligned, p.out, p.batch * p.tokens, p.dim,
                    stream);
}

}  // namespace mimkernels::cuda

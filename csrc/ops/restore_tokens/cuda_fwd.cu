#include "cuda/rows.cuh"
#include "ops/restore_tokens/cuda.h"

namespace mimkernels::cuda {
namespace {

// in:       x [B, P + K, D], pos [P + N, D] by stride; ids_restore int64 [B, N] by stride;
//           mask_token [D]
// out:      [B, P + N, D]
// bounds:   an id outside [0, N) reads as zeros
// rest:     see write_rows_kernel
struct RestoredRows {
  static constexpr bool kMayAdd = true;
  RestoreTokensFwdParams p;

  template <typename T>
  __device__ __forceinline__ RowSource<T> source(int64_t row) const {
    int64_t j;
    const int64_t b = divide(row, p.num_prefix + p.tokens, j);
    const T* const pos = p.pos.given ? row_at<T>(p.pos, 0, j) : nullptr;
    if (j < p.num_prefix) {
      return {row_at<T>(p.x, b, j), pos};
    }
    const int64_t id = __ldg(p.ids_restore.data + b * p.ids_restore.stride1 + j - p.num_prefix);
    if (id < 0 || id >= p.tokens) {
      return {nullptr, pos};
    }
    return {
        id < p.kept ? row_at<T>(p.x, b, p.num_prefix + id) : static_cast<const T*>(p.mask_token),
        pos};
  }
};

}  // namespace

cudaError_t restore_tokens_fwd(const RestoreTokensFwdParams& p, cudaStream_t stream) {
  const bool aligned = rows_aligned({p.out, 0, 0}, p.dim, p.dtype) &&
                       rows_aligned(p.x, p.dim, p.dtype) && rows_aligned(p.pos, p.dim, p.dtype) &&
                       rows_aligned({p.mask_token, 0, 0}, p.dim, p.dtype);
  return write_rows(RestoredRows{p}, p.dtype, p.pos.given, aligned, p.out,
                    p.batch * (p.num_prefix + p.tokens), p.dim, stream);
}

}  // namespace mimkernels::cuda

#include "cuda/row_sums.h"
#include "ops/fill_mask_tokens/cuda.h"

namespace mimkernels::cuda {
namespace {

RowSumsParams row_sums_of(const FillMaskTokensBwdParams& p) {
  RowSumsParams sums;
  sums.dtype = p.dtype;
  sums.images = p.batch;
  sums.rows = p.tokens;
  sums.dim = p.dim;
  sums.grad = p.grad;
  sums.mask = p.mask;
  sums.dx = p.dx;
  sums.dmasked = p.dmask_token;
  return sums;
}

}  // namespace

int64_t fill_mask_tokens_bwd_workspace(const FillMaskTokensBwdParams& p) {
  return row_sums_workspace(row_sums_of(p));
}

cudaError_t fill_mask_tokens_bwd(const FillMaskTokensBwdParams& p, float* workspace,
                                 cudaStream_t stream) {
  return row_sums(row_sums_of(p), workspace, stream);
}

}  // namespace mimkernels::cuda

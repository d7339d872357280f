#include "cuda/row_sums.h"
#include "cuda/scatter_rows.h"
#include "ops/restore_tokens/cuda.h"

namespace mimkernels::cuda {
namespace {

RowSumsParams row_sums_of(const RestoreTokensBwdParams& p) {
  RowSumsParams sums;
  sums.dtype = p.dtype;
  sums.images = p.batch;
  sums.rows = p.num_prefix + p.tokens;
  sums.dim = p.dim;
  sums.grad = p.grad;
  sums.ids = p.ids_restore;
  sums.first = p.num_prefix;
  sums.kept = p.kept;
  sums.dmasked = p.dmask_token;
  sums.dall = p.dpos;
  return sums;
}

}  // namespace

int64_t restore_tokens_bwd_workspace(const RestoreTokensBwdParams& p) {
  return row_sums_workspace(row_sums_of(p));
}

cudaError_t restore_tokens_bwd(const RestoreTokensBwdParams& p, float* workspace,
                               cudaStream_t stream) {
  if (p.dx != nullptr) {
    ScatterRowsParams scatter;
    scatter.grad_dtype = p.dtype;
    scatter.out_dtype = p.dtype;
    scatter.batch = p.batch;
    scatter.kept = p.tokens;
    scatter.num_prefix = p.num_prefix;
    scatter.grad = p.grad;
    scatter.ids = p.ids_restore;
    scatter.copied = p.num_prefix;
    scatter.grid = {p.batch, 1, 1, p.num_prefix + p.kept, p.dim, 1, 1, p.dim};
    scatter.out = p.dx;
    const cudaError_t error = scatter_rows(scatter, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return row_sums(row_sums_of(p), workspace, stream);
}

}  // namespace mimkernels::cuda

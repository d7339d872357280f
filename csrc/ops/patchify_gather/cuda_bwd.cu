#include "cuda/scatter_rows.h"
#include "ops/patchify_gather/cuda.h"

namespace mimkernels::cuda {

cudaError_t patchify_gather_bwd(const PatchifyGatherBwdParams& p, cudaStream_t stream) {
  ScatterRowsParams scatter;
  scatter.grad_dtype = p.grad_dtype;
  scatter.out_dtype = p.out_dtype;
  scatter.masks = p.masks;
  scatter.batch = p.grid.batch;
  scatter.kept = p.kept;
  scatter.grad = p.grad;
  scatter.has_ids = p.ids.given;
  scatter.ids = p.ids;
  scatter.grid = p.grid;
  scatter.has_scale = p.has_scale;
  scatter.scale = p.scale;
  scatter.out = p.dimages;
  return scatter_rows(scatter, stream);
}

}  // namespace mimkernels::cuda

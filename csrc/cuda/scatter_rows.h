// The transpose of a gather, owned by its result: every token, or patch of an image, sums the rows
// that were gathered from it. The backward of gather_tokens, restore_tokens and patchify_gather.
#pragma once

#include <cuda_runtime.h>

#include "core/params.h"

namespace mimkernels::cuda {

struct ScatterRowsParams {
  DType grad_dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat32;
  int64_t masks = 1;
  int64_t batch = 0;
  int64_t kept = 0;        // ids per mask and image
  int64_t num_prefix = 0;  // P: grad's rows are P prefix tokens, then one per id
  Rows grad;               // [M * B, P + K, E]
  bool has_ids = true;     // without ids, row n goes to target n
  Ids ids;                 // [M, B, K]
  // The first targets of an image that take grad[b, j] as it is; target `copied` + n is token n.
  int64_t copied = 0;
  // The result as images, one target per patch, E elements each. Tokens [B, N, D] are images of N
  // rows and D columns, divided into patches of one row.
  PatchGrid grid;
  bool has_scale = false;
  const float* scale = nullptr;  // [C]
  void* out = nullptr;           // contiguous
};

// out = scale * the sum over (m, k) with ids[m, b, k] = n of grad[m * B + b, P + k], 0 if none; on
// `stream`, asynchronously. The same bits on every run and every device.
cudaError_t scatter_rows(const ScatterRowsParams& params, cudaStream_t stream);

}  // namespace mimkernels::cuda

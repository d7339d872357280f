// Sums of gradient rows over the batch: mask tokens, positions, prefix tokens. The backward of
// fill_mask_tokens and parts of restore_tokens and gather_tokens.
#pragma once

#include <cuda_runtime.h>

#include "core/params.h"

namespace mimkernels::cuda {

struct RowSumsParams {
  DType dtype = DType::kFloat32;
  int64_t images = 0;
  int64_t rows = 0;  // R
  int64_t dim = 0;
  Rows grad;  // [A, R, D]; rows beyond R are left alone
  // Row j of image a is masked if mask[a, j], or if ids[a, j - first] is in [kept, R - first);
  // without either, none is.
  BoolMask mask;
  Ids ids;
  int64_t first = 0;
  int64_t kept = 0;
  void* dx = nullptr;       // [A, R, D]: grad, zero where masked; or null
  void* dmasked = nullptr;  // [D]: the sum of the masked rows; or null
  void* dall = nullptr;     // [R, D]: the sum over the images; or null
};

// On `stream`, asynchronously. `workspace` holds row_sums_workspace(params) floats. The same bits
// on every run and every device.
cudaError_t row_sums(const RowSumsParams& params, float* workspace, cudaStream_t stream);

// Floats of workspace that row_sums needs.
int64_t row_sums_workspace(const RowSumsParams& params);

// Up to three sums of the same size, of one launch.
struct PartialSums {
  int count = 0;
  const float* partial[3] = {};
  void* out[3] = {};

  void add(const float* from, void* to) {
    partial[count] = from;
    out[count] = to;
    ++count;
  }
};

// out[i] = the sum over `parts` of partial[part, i], i < elements, for each of the sums; in the order
// of the parts' number modulo 8 (32 where there are hundreds), then of the parts, compensated.
cudaError_t sum_partials(DType dtype, const PartialSums& sums, int64_t parts, int64_t elements,
                         cudaStream_t stream);
cudaError_t sum_partials(DType dtype, const float* partial, int64_t parts, int64_t elements,
                         void* out, cudaStream_t stream);

}  // namespace mimkernels::cuda

// What the launchers of fill_mask_tokens take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

struct FillMaskTokensFwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  Rows x;                            // [B, N, D]
  BoolMask mask;                     // [B, N], true = replaced
  const void* mask_token = nullptr;  // [D]
  void* out = nullptr;               // [B, N, D]
};

struct FillMaskTokensBwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  Rows grad;  // [B, N, D]
  BoolMask mask;
  void* dx = nullptr;           // [B, N, D] or null
  void* dmask_token = nullptr;  // [D] or null
};

}  // namespace mimkernels

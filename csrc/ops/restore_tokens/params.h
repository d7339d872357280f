// What the launchers of restore_tokens take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

struct RestoreTokensFwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t kept = 0;
  int64_t num_prefix = 0;
  int64_t dim = 0;
  Rows x;                            // [B, P + K, D]
  Ids ids_restore;                   // [B, N]
  const void* mask_token = nullptr;  // [D]
  Rows pos;                          // [P + N, D]
  void* out = nullptr;               // [B, P + N, D]
};

struct RestoreTokensBwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t kept = 0;
  int64_t num_prefix = 0;
  int64_t dim = 0;
  Rows grad;                    // [B, P + N, D]
  Ids ids_restore;              // [B, N]
  void* dx = nullptr;           // [B, P + K, D] or null
  void* dmask_token = nullptr;  // [D] or null
  void* dpos = nullptr;         // [P + N, D] or null
};

}  // namespace mimkernels

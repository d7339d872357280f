// What the launchers of gather_tokens take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

struct GatherTokensFwdParams {
  DType dtype = DType::kFloat32;
  int64_t masks = 0;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t kept = 0;
  int64_t num_prefix = 0;
  int64_t dim = 0;
  Rows x;               // [B, N, D]
  Ids ids;              // [M, B, K]
  Rows pos;             // [N, D]
  Rows prefix;          // [P, D]
  void* out = nullptr;  // [M * B, P + K, D]
};

struct GatherTokensBwdParams {
  DType dtype = DType::kFloat32;
  int64_t masks = 0;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t kept = 0;
  int64_t num_prefix = 0;
  int64_t dim = 0;
  Rows grad;                // [M * B, P + K, D]
  Ids ids;                  // [M, B, K]
  void* dx = nullptr;       // [B, N, D] or null
  void* dpos = nullptr;     // [N, D] or null
  void* dprefix = nullptr;  // [P, D] or null
};

}  // namespace mimkernels

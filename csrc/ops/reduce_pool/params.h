// What the launchers of reduce_pool take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

enum class ReduceKind : int32_t { kMean = 0, kMax = 1, kGem = 2 };

// reduce_pool, forward and backward: the mean, the maximum, or (mean of max(x, eps)^p)^(1/p) of the
// allowed tokens, column by column; zeros where no token is allowed.
struct ReducePoolParams {
  DType dtype = DType::kFloat32;
  ReduceKind kind = ReduceKind::kMean;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t num_prefix = 0;
  int64_t dim = 0;
  float eps = 0.0f;
  BoolMask mask;
  const float* p = nullptr;  // [1], for kGem
  Rows x;                    // [B, N, D]; not given in the backward of kMean and kMax
  void* out = nullptr;       // forward: [B, D]
  int32_t* index = nullptr;  // [B, D] of kMax: the first largest token, -1 if none is allowed
  float* moment = nullptr;   // [B, D] of kGem: the mean of the powers, 0 if none is allowed
  Rows dout;                 // backward: [B, D] as rows of stride1
  void* dx = nullptr;        // backward: [B, N, D] or null
  float* dp = nullptr;       // backward: [1] or null
};

}  // namespace mimkernels

// What the launchers of patchify_gather take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

struct PatchifyGatherFwdParams {
  PatchGrid grid;
  Images images;
  DType out_dtype = DType::kFloat32;
  int64_t masks = 1;
  int64_t kept = 0;
  Ids ids;              // [M, B, K]; without ids every patch, in order
  void* out = nullptr;  // [M * B, K, E]
};

struct PatchifyGatherBwdParams {
  PatchGrid grid;
  DType grad_dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat32;
  int64_t masks = 1;
  int64_t kept = 0;
  Rows grad;  // [M * B, K, E]
  Ids ids;
  bool has_scale = false;
  const float* scale = nullptr;  // [C]
  void* dimages = nullptr;       // [B, C, T, H, W]
};

}  // namespace mimkernels

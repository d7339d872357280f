// What the launchers of masked_patch_loss take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

enum class LossKind : int32_t { kMse = 0, kL1 = 1, kSmoothL1 = 2 };

struct MaskedPatchLossParams {
  PatchGrid grid;
  Images images;
  DType dtype = DType::kFloat32;  // of pred and dpred
  Rows pred;                      // [B, L, E]
  int64_t length = 0;             // L
  Ids ids;                        // [B, L] with stride0 = 0, or, given instead:
  // [B, L = N], true = counted; or, finer than the patches, [B, gh * cells_h, gw * cells_w] for a
  // grid of gh x gw patches, its rows mask_stride_row apart.
  BoolMask mask;
  int64_t mask_stride_row = 0;
  int64_t cells_h = 0;  // of each patch; 0: the mask has one value per patch
  int64_t cells_w = 0;
  bool norm_pix = false;
  int64_t local_norm = 0;  // side of the box that normalises each pixel, odd, or 0
  LossKind kind = LossKind::kMse;
  float beta = 1.0f;
  bool channels_last = true;
  bool mean = true;
  float* loss = nullptr;        // forward: [B, L], or [1] if mean
  const float* grad = nullptr;  // backward: [B, L] by the strides below, or [1] if mean
  int64_t grad_strides[2] = {0, 0};
  void* dpred = nullptr;  // backward: [B, L, E]
};

}  // namespace mimkernels

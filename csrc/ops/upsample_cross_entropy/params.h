// What the launchers of upsample_cross_entropy take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

// Letters: B images, C classes, h x w logits, H x W labels.
struct UpsampleCrossEntropyParams {
  DType dtype = DType::kFloat32;  // of logits and dlogits
  int64_t batch = 0;              // B
  int64_t classes = 0;            // C
  int64_t source_h = 0;           // h, of the logits
  int64_t source_w = 0;           // w
  int64_t height = 0;             // H, of the labels
  int64_t width = 0;              // W
  const void* logits = nullptr;   // [B, C, h, w] by the strides of B, C and h; w is contiguous
  int64_t logits_strides[3] = {0, 0, 0};
  const int64_t* labels = nullptr;  // [B, H, W] by the strides of B and H; W is contiguous
  int64_t labels_strides[2] = {0, 0};
  bool has_weight = false;
  const float* weight = nullptr;  // [C]
  int64_t ignore_index = 0;
  bool align_corners = false;
  float smoothing = 0.0f;
  float* loss = nullptr;  // forward: [1]
  float* statistics =
      nullptr;              // [2, B, H, W]: largest logit m, sum of exp(logit - m); 0 if ignored
  float* totals = nullptr;  // [2]: weights of the labels of counted pixels; of all classes
  const float* grad = nullptr;  // backward: [1]
  void* dlogits = nullptr;      // backward: [B, C, h, w], contiguous
};

}  // namespace mimkernels

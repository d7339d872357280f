// What the launchers of masked_feature_loss take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

enum class FeatureLossKind : int32_t { kMse = 0, kL1 = 1, kSmoothL1 = 2, kCosine = 3 };

// The square of the length of a vector whose cosine is taken is at least this.
constexpr float kLeastSquare = 1e-16f;

// Letters: A x R rows of D features; A = B, or A = 1 and ids count the tokens of all images.
struct MaskedFeatureLossParams {
  DType dtype = DType::kFloat32;         // of pred and dpred
  DType target_dtype = DType::kFloat32;  // any float type
  int64_t batch = 0;                     // A
  int64_t length = 0;                    // R
  int64_t images = 0;                    // B
  int64_t tokens = 0;                    // N
  int64_t dim = 0;                       // D
  Rows pred;                             // [A, R, D]
  Rows target;                           // [B, N, D]
  Ids ids;                               // [A, R] with stride0 = 0; not given: all tokens, R = N
  bool layer_norm = false;
  float eps = 0.0f;
  FeatureLossKind kind = FeatureLossKind::kMse;
  float beta = 1.0f;  // of smooth L1, at least 1e-30
  bool mean = true;
  float* loss = nullptr;        // forward: [A, R], or [1] if mean
  const float* grad = nullptr;  // backward: [A, R] by the strides below, or [1] if mean
  int64_t grad_strides[2] = {0, 0};
  void* dpred = nullptr;  // backward: [A, R, D]
};

// A token of an image.
struct TokenPlace {
  int64_t image;
  int64_t token;
};

}  // namespace mimkernels

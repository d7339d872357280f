// What the launchers of add_layer_norm take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

// Letters: A images of R rows of C channels. The parameters of the layer are fp32, and the residual
// has the dtype of x + y, which x comes in.
struct AddLayerNormFwdParams {
  DType residual_dtype = DType::kFloat32;  // of x and residual
  DType y_dtype = DType::kFloat32;         // residual_dtype, or any beside fp32
  DType out_dtype = DType::kFloat32;
  float eps = 0.0f;
  int64_t batch = 0;   // A
  int64_t tokens = 0;  // R
  int64_t dim = 0;     // C
  Rows x;              // [A, R, C]
  Rows y;              // [A, R, C] or not given; without it, neither scale, drop nor residual
  bool has_weight = false;
  bool has_bias = false;
  bool has_scale = false;
  bool has_drop = false;
  const float* weight = nullptr;  // [C]
  const float* bias = nullptr;    // [C]
  const float* scale = nullptr;   // [C]
  const float* drop = nullptr;    // [A]
  void* residual = nullptr;       // [A, R, C] or null
  void* out = nullptr;            // [A, R, C]
  float* mean = nullptr;          // [A, R]
  float* rstd = nullptr;          // [A, R]
};

struct AddLayerNormBwdParams {
  DType residual_dtype = DType::kFloat32;  // of residual, grad_residual and dx
  DType y_dtype = DType::kFloat32;         // of y and dy
  DType out_dtype = DType::kFloat32;       // of grad_out
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  Rows grad_residual;  // [A, R, C] or not given: zeros
  Rows grad_out;       // [A, R, C] or not given: zeros; then neither dweight nor dbias
  Rows residual;       // [A, R, C]
  Rows y;              // [A, R, C], given where dscale is asked for
  bool has_weight = false;
  bool has_scale = false;
  bool has_drop = false;
  const float* weight = nullptr;  // [C]
  const float* scale = nullptr;   // [C]
  const float* drop = nullptr;    // [A]
  const float* mean = nullptr;    // [A, R]
  const float* rstd = nullptr;    // [A, R]
  void* dx = nullptr;             // [A, R, C] or null
  void* dy = nullptr;             // [A, R, C] or null
  float* dweight = nullptr;       // [C] or null
  float* dbias = nullptr;         // [C] or null
  float* dscale = nullptr;        // [C] or null
};

}  // namespace mimkernels

// What the launchers of bias_gelu take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

// Letters: A x R rows of E features.
struct BiasGeluFwdParams {
  DType dtype = DType::kFloat32;       // of x and out
  DType bias_dtype = DType::kFloat32;  // dtype or float32
  bool tanh = false;                   // the tanh approximation, else erf
  int64_t batch = 0;                   // A
  int64_t tokens = 0;                  // R
  int64_t dim = 0;                     // E
  Rows x;                              // [A, R, E]
  bool has_bias = false;
  const void* bias = nullptr;  // [E]
  void* out = nullptr;         // [A, R, E]
};

struct BiasGeluBwdParams {
  DType dtype = DType::kFloat32;       // of grad, x and dx
  DType bias_dtype = DType::kFloat32;  // of bias and dbias
  bool tanh = false;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  Rows grad;  // [A, R, E]
  Rows x;     // [A, R, E]
  bool has_bias = false;
  const void* bias = nullptr;  // [E]
  void* dx = nullptr;          // [A, R, E] or null
  void* dbias = nullptr;       // [E] or null
};

}  // namespace mimkernels

// What every launcher takes. Pointers and sizes only: the binding has checked shapes, dtypes and
// devices, and has allocated the outputs. Sizes and strides count elements, not bytes.
//
// Letters: M masks per image, B images, N tokens, K kept tokens, P prefix tokens, D features,
// C channels, E elements of one patch.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mimkernels {

// Whether an optional tensor was given is said by `given` (or a `has_` flag), never by its address:
// a tensor without elements may have a null one. An output is null where it was not asked for.

// A [A, R, D] tensor by its strides; the last dim is contiguous. Strides may be 0 (expanded).
// A [R, D] tensor has stride0 = 0.
struct Rows {
  const void* data = nullptr;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
  bool given = false;
};

// int64 ids [M, B, K] (or [B, N] with stride0 = 0), the last dim contiguous.
struct Ids {
  const int64_t* data = nullptr;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
  bool given = false;
};

// A bool [B, N] mask, the last dim contiguous.
struct BoolMask {
  const uint8_t* data = nullptr;
  int64_t stride0 = 0;
  bool given = false;
};

// Images [B, C, T, H, W] divided into a row-major grid of patches; the last dim is contiguous.
// scale and shift [C] are fp32 and given together.
struct Images {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_batch = 0;
  int64_t stride_channel = 0;
  int64_t stride_frame = 0;
  int64_t stride_row = 0;
  bool has_scale = false;
  const float* scale = nullptr;
  const float* shift = nullptr;
};

struct PatchGrid {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t frames = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t patch_t = 1;
  int64_t patch_h = 1;
  int64_t patch_w = 1;
};

}  // namespace mimkernels

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

// Images [B, C, T, H, W] cut into a row-major grid of patches; the last dim is contiguous.
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

struct RandomMaskParams {
  uint64_t seed = 0;
  uint64_t offset = 0;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t keep = 0;
  bool sorted = false;
  int64_t* ids_shuffle = nullptr;  // [B, N]
  int64_t* ids_restore = nullptr;  // [B, N]
  float* mask = nullptr;           // [B, N], 1 = removed
};

struct MaskFromNoiseParams {
  const float* noise = nullptr;  // [B, N]
  int64_t noise_stride = 0;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t keep = 0;
  bool sorted = false;
  int64_t* ids_shuffle = nullptr;
  int64_t* ids_restore = nullptr;
  float* mask = nullptr;
};

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

struct FillMaskTokensFwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  Rows x;                            // [B, N, D]
  BoolMask mask;                     // [B, N], true = replaced
  const void* mask_token = nullptr;  // [D]
  void* out = nullptr;               // [B, N, D]
};

struct FillMaskTokensBwdParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  Rows grad;  // [B, N, D]
  BoolMask mask;
  void* dx = nullptr;           // [B, N, D] or null
  void* dmask_token = nullptr;  // [D] or null
};

enum class LossKind : int32_t { kMse = 0, kL1 = 1, kSmoothL1 = 2 };

struct MaskedPatchLossParams {
  PatchGrid grid;
  Images images;
  DType dtype = DType::kFloat32;  // of pred and dpred
  Rows pred;                      // [B, L, E]
  int64_t length = 0;             // L
  Ids ids;                        // [B, L] with stride0 = 0, or, given instead:
  BoolMask mask;                  // [B, L = N], true = counted
  bool norm_pix = false;
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

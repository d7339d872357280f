// What the launchers of mask_from_noise take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

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

}  // namespace mimkernels

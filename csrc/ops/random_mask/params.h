// What the launchers of random_mask take; see core/params.h.
#pragma once

#include "core/params.h"

namespace mimkernels {

struct RandomMaskParams {
  uint64_t seed = 0;
  uint64_t offset = 0;
  const int64_t* step = nullptr;  // where the kernel runs; its value is added to offset, or null
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t keep = 0;
  bool sorted = false;
  int64_t* ids_shuffle = nullptr;  // [B, N]
  int64_t* ids_restore = nullptr;  // [B, N]
  float* mask = nullptr;           // [B, N], 1 = removed
};

}  // namespace mimkernels

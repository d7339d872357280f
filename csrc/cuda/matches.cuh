// The inverse of ids on the fly: which rows were gathered from a token.
#pragma once

#include "core/params.h"
#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace mimkernels::cuda {

// Calls found(m, k) for every ids[m, b, k] == n, in the order of m, then k. All lanes of a warp
// call it with the same arguments: they search the ids together, and found runs in all of them.
template <typename Found>
__device__ __forceinline__ void for_each_match(const Ids& ids, int64_t masks, int64_t kept,
                                               int64_t b, int64_t n, const Found& found) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = 0; m < masks; ++m) {
    const int64_t* const row = ids.data + m * ids.stride0 + b * ids.stride1;
#pragma unroll 2
    for (int64_t start = 0; start < kept; start += kWarp) {
      const bool match = start + lane < kept && __ldg(row + start + lane) == n;
      unsigned left = __ballot_sync(kWarpMask, match);
      while (left != 0) {
        found(m, start + __ffs(static_cast<int>(left)) - 1);
        left &= left - 1;
      }
    }
  }
}

}  // namespace mimkernels::cuda

// Element types that cross the boundary between bindings and kernels. No torch, no CUDA runtime.
#pragma once

#include <cstdint>

namespace mimkernels {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

}  // namespace mimkernels

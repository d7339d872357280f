// The thread pool as kernels see it: a plain function pointer, so that kernels need no torch.
#pragma once

#include <cstdint>

namespace mimkernels {

// Works on the half-open range [begin, end).
using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

// Splits [begin, end) into at most (end - begin) / grain contiguous ranges and waits for all of
// them. Which thread gets which range must not change any result.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context);

}  // namespace mimkernels

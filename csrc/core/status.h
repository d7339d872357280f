// What a launcher reports. Kernels never throw: an exception must not cross a thread pool or an
// instruction-set boundary, so the binding turns a Status into the exception Python sees.
#pragma once

#include <cstdint>

namespace mimkernels {

enum class StatusCode : int32_t { kOk = 0, kIdOutOfRange = 1, kOutOfMemory = 2, kUnsupported = 3 };

struct Status {
  StatusCode code = StatusCode::kOk;
  // Of kIdOutOfRange: position[0..2] is the place in the [M, B, K] ids, value the id, limit the
  // exclusive end of the valid range.
  int64_t position[3] = {0, 0, 0};
  int64_t value = 0;
  int64_t limit = 0;

  bool ok() const { return code == StatusCode::kOk; }
};

}  // namespace mimkernels

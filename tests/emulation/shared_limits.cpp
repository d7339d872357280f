// csrc/cuda/shared_limits.h, with a runtime that counts what it is told.
#include "cuda/shared_limits.h"

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

mimkernels::cuda::SharedLimits limits;
std::atomic<int> told = 0;

}  // namespace

// How often the runtime was told when this many threads ask at once, each 100 times. It answers with
// `error`, which those who asked it are given: -1 if any was given another.
EXPORTED int shared_limit_calls(int64_t kernel, int64_t device, int64_t bytes, int64_t threads,
                                int64_t error) {
  const int before = told;
  std::atomic<bool> wrong = false;
  const auto ask = [&] {
    for (int i = 0; i < 100; ++i) {
      bool asked = false;
      const int64_t got = limits.raise_to(reinterpret_cast<const void*>(kernel),
                                          static_cast<int>(device), static_cast<int>(bytes), [&] {
                                            asked = true;
                                            ++told;
                                            return error;
                                          });
      if (got != (asked ? error : 0)) wrong = true;
    }
  };
  std::vector<std::thread> asking;
  for (int64_t i = 0; i < threads; ++i) asking.emplace_back(ask);
  for (std::thread& thread : asking) thread.join();
  return wrong ? -1 : told - before;
}

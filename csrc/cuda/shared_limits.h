// What the runtime was told of each kernel, so that it is told once.
#pragma once

#include <map>
#include <mutex>
#include <utility>

namespace mimkernels::cuda {

// How much dynamic shared memory each kernel may have on each device. Any thread may ask.
class SharedLimits {
 public:
  // Calls `raise` where `kernel` may not have `bytes` on `device` yet, and returns its error, 0 if
  // there is none. Only what has succeeded is remembered.
  template <typename Raise>
  auto raise_to(const void* kernel, int device, int bytes, Raise raise) -> decltype(raise()) {
    const std::lock_guard lock(mutex_);
    int& allowed = allowed_[{kernel, device}];
    using Error = decltype(raise());
    if (bytes <= allowed) return Error{};
    const Error error = raise();
    if (error == Error{}) allowed = bytes;
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, int> allowed_;
};

}  // namespace mimkernels::cuda

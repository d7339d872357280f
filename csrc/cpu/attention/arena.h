// Scratch memory of the attention kernels.
#pragma once

#include <cstdlib>

#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Memory that a thread keeps between calls: fresh pages cost more than the attention of a small
// ViT.
class ThreadMemory {
 public:
  ~ThreadMemory() { free(data_); }
  // At least `bytes`, cache-line aligned; null when the system has none left.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = 0;
      data_ = aligned_alloc(64, bytes);
      if (data_ != nullptr) size_ = bytes;
    }
    return data_;
  }
  // Gives large memory back.
  void trim() {
    if (size_ <= kKept) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t{4} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline thread_local ThreadMemory thread_memory;

// Hands out pieces of one block: first every piece is measured, then the block is reserved, then
// the same calls return memory.
class Arena {
 public:
  ~Arena() {
    if (base_ != nullptr) thread_memory.trim();
  }
  template <typename E>
  E* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(max_of(count, 0)) * sizeof(E) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<E*>(base_ + at);
  }
  float* floats(int64_t count) { return take<float>(count); }
  // False when there is no memory.
  bool reserve() {
    base_ = static_cast<char*>(thread_memory.reserve(max_of(static_cast<int64_t>(used_), 64)));
    used_ = 0;
    return base_ != nullptr;
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace mimkernels::MIMKERNELS_ISA

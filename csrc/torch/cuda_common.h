// What the bindings of the CUDA kernels share: checks, stream, errors, outputs, and under which
// names the kernels are registered.
//
// The same bindings serve the kernels as compiled for the host (csrc/emulation): they then take CPU
// tensors, and their overloads are named "cuda_emulated" instead of "cuda".
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "tensor_args.h"

#ifndef MIMKERNELS_EMULATION
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace mimkernels::binding {

#ifdef MIMKERNELS_EMULATION

#define MIMKERNELS_CUDA_OVERLOAD "cuda_emulated"
// Followed by the block that registers, with `m` as in STABLE_TORCH_LIBRARY_IMPL.
#define MIMKERNELS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(mimkernels, CPU, m)

inline bool on_device_of(const Tensor& tensor, const Tensor&) { return tensor.is_cpu(); }

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
  }
}

#else

#define MIMKERNELS_CUDA_OVERLOAD "cuda"
#define MIMKERNELS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(mimkernels, CUDA, m)

inline bool on_device_of(const Tensor& tensor, const Tensor& first) {
  return tensor.is_cuda() && tensor.get_device_index() == first.get_device_index();
}

// Makes the tensor's device the current one, until the end of the scope.
struct OnDevice {
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error) { STD_CUDA_CHECK(error); }

#endif

// One schema's implementation, in the block of MIMKERNELS_CUDA_LIBRARY.
#define MIMKERNELS_CUDA_IMPL(m, schema) \
  m.impl(#schema "." MIMKERNELS_CUDA_OVERLOAD, TORCH_BOX(&mimkernels::binding::schema))

// Rank, sizes (kAny: any) and device: every tensor of a call lies on the first one's.
inline void check_tensor(const Tensor& tensor, const char* name, const Tensor& first,
                         std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool good = sizes.size() == expected.size();
  size_t d = 0;
  for (const int64_t size : expected) {
    good = good && (size == kAny || sizes[d] == size);
    ++d;
  }
  check_argument(good, std::string(name) + " has shape " + shape_text(sizes.data(), sizes.size()) +
                           ", expected " + shape_text(expected.begin(), expected.size()));
  check_argument(on_device_of(tensor, first),
                 std::string(name) + " is not on the device of the first tensor, or on none that " +
                     MIMKERNELS_CUDA_OVERLOAD + " takes");
}

inline Tensor new_output_like(const Tensor& like, std::initializer_list<int64_t> sizes,
                              ScalarType type) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

}  // namespace mimkernels::binding

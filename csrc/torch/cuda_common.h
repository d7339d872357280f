// What the bindings of the CUDA kernels share: checks, stream, errors, outputs, and under which
// names the kernels are registered.
//
// The same bindings serve the kernels as compiled for the host (csrc/emulation): they then take CPU
// tensors, and their overloads are named "cuda_emulated" instead of "cuda".
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <string>

#include "torch/tensor_args.h"

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

// check_tensor beside the first tensor of a call, for the functions that the CPU shares.
struct SameDevice {
  const Tensor& first;

  void operator()(const Tensor& tensor, const char* name,
                  std::initializer_list<int64_t> expected) const {
    check_tensor(tensor, name, first, expected);
  }
};

// With MIMKERNELS_DEBUG=1, refuses ids [..., K] outside [0, limit), which waits for the device.
// Otherwise nothing is checked: kernels read zeros for such ids, or count nothing.
inline void check_ids(const char* op, const char* name, const OptionalTensor& ids_any,
                      int64_t limit) {
  const char* const debug = std::getenv("MIMKERNELS_DEBUG");
  if (!ids_any.has_value() || debug == nullptr || *debug == 0 || std::string(debug) == "0") return;
  const Tensor ids = torch::stable::contiguous(
      torch::stable::to(*ids_any, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  const int64_t* const data = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (data[i] >= 0 && data[i] < limit) continue;
    throw std::out_of_range(std::string(op) + ": " + name + " holds " + std::to_string(data[i]) +
                            ", outside [0, " + std::to_string(limit) + ")");
  }
}

inline Tensor new_output_like(const Tensor& like, std::initializer_list<int64_t> sizes,
                              ScalarType type) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

inline Tensor new_output_like_if(bool needed, const Tensor& like,
                                 std::initializer_list<int64_t> sizes, ScalarType type) {
  return needed ? new_output_like(like, sizes, type) : new_output_like(like, {0}, type);
}

// Memory for kernels alone. It may be freed while they still run: torch's allocator reuses it in
// stream order.
inline Tensor new_workspace(const Tensor& like, int64_t elements,
                            ScalarType type = ScalarType::Float) {
  return new_output_like(like, {elements}, type);
}

}  // namespace mimkernels::binding

// What the bindings of the CUDA kernels share: the device and stream of their calls, workspaces,
// errors, registration.
//
// The same bindings serve the kernels as compiled for the host (csrc/emulation): they then take CPU
// tensors, and their overloads are named "cuda_emulated" instead of "cuda".
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "torch/registration.h"
#include "torch/tensor_args.h"

#ifndef MIMKERNELS_EMULATION
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace mimkernels::binding {

#ifdef MIMKERNELS_EMULATION

#define MIMKERNELS_CUDA_OVERLOAD "cuda_emulated"
#define MIMKERNELS_CUDA_KEY CPU

inline bool on_device_of(const Tensor& tensor, const Tensor&) { return tensor.is_cpu(); }

struct CurrentDevice {
  explicit CurrentDevice(const Tensor&) {}
};

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
  }
}

#else

#define MIMKERNELS_CUDA_OVERLOAD "cuda"
#define MIMKERNELS_CUDA_KEY CUDA

inline bool on_device_of(const Tensor& tensor, const Tensor& first) {
  return tensor.is_cuda() && tensor.get_device_index() == first.get_device_index();
}

// Makes the tensor's device the current one, until the end of the scope.
struct CurrentDevice {
  explicit CurrentDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {}
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

template <typename T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
}

// The device of a call's first tensor, on which all others lie.
class OnCuda {
 public:
  static constexpr const char* kDevice = MIMKERNELS_CUDA_OVERLOAD;

  explicit OnCuda(const Tensor& first) : first_(first) {}
  // For a call that may have no tensor.
  explicit OnCuda(const torch::stable::Device& device)
      : first_(
            torch::stable::empty({nullptr, size_t{0}}, ScalarType::Float, std::nullopt, device)) {
    require(has(first_), "the device is one that the kernels run on");
  }

  bool has(const Tensor& tensor) const { return on_device_of(tensor, first_); }

  // Contiguous, not initialised.
  Tensor empty(Sizes sizes, ScalarType type) const {
    return torch::stable::new_empty(
        first_, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
  }

  // With MIMKERNELS_DEBUG=1, refuses ids outside [0, limit) but `allowed`, which waits for the device.
  // Otherwise nothing is checked: kernels read zeros for such ids, or count nothing.
  void check_ids(const std::string& op, const char* name, const Tensor& ids_any, int64_t limit,
                 bool, std::optional<int64_t> allowed = std::nullopt) const {
    const char* const debug = std::getenv("MIMKERNELS_DEBUG");
    if (debug == nullptr || *debug == 0 || std::string(debug) == "0") return;
    const Tensor ids = torch::stable::contiguous(
        torch::stable::to(ids_any, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
    const int64_t* const data = static_cast<const int64_t*>(ids.data_ptr());
    for (int64_t i = 0; i < ids.numel(); ++i) {
      if ((data[i] >= 0 && data[i] < limit) || data[i] == allowed) continue;
      throw std::out_of_range(op + ": " + name + " holds " + std::to_string(data[i]) +
                              ", outside [0, " + std::to_string(limit) + ")");
    }
  }

 protected:
  template <typename Params>
  void launch(cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params) const {
    const CurrentDevice current(first_);
    check_cuda(launcher(params, current_stream(first_)));
  }

  // With memory of so many elements for the kernels alone. It is freed while they may still run:
  // torch's allocator reuses it in stream order.
  template <typename Params, typename T>
  void launch(cudaError_t (*launcher)(const Params&, T*, cudaStream_t), int64_t elements,
              const Params& params) const {
    const CurrentDevice current(first_);
    const Tensor workspace = empty({elements}, scalar_type_of<T>());
    check_cuda(launcher(params, static_cast<T*>(workspace.data_ptr()), current_stream(first_)));
  }

 private:
  Tensor first_;
};

}  // namespace mimkernels::binding

// The Device of <op>_<pass>, whose member run(params) is `launch_call`, and its registration.
#define MIMKERNELS_BIND_CUDA_AS(op, pass, launch_call)                            \
  namespace mimkernels::binding::on_cuda {                                        \
  struct op##_##pass : OnCuda {                                                   \
    static constexpr const char* kOp = #op;                                       \
    using OnCuda::OnCuda;                                                         \
    template <typename Params>                                                    \
    void run(const Params& params) const {                                        \
      launch_call;                                                                \
    }                                                                             \
  };                                                                              \
  }                                                                               \
  MIMKERNELS_REGISTER(MIMKERNELS_CUDA_KEY, op##_##pass, MIMKERNELS_CUDA_OVERLOAD, \
                      mimkernels::binding::op##_##pass<mimkernels::binding::on_cuda::op##_##pass>)

// Registers binding::<op>_<pass> for CUDA devices; its launcher is cuda::<op>_<pass>.
#define MIMKERNELS_BIND_CUDA(op, pass) \
  MIMKERNELS_BIND_CUDA_AS(op, pass, launch(&cuda::op##_##pass, params))

// The same where the launcher takes a workspace of cuda::<op>_<pass>_workspace(params) elements.
#define MIMKERNELS_BIND_CUDA_WITH_WORKSPACE(op, pass) \
  MIMKERNELS_BIND_CUDA_AS(                            \
      op, pass, launch(&cuda::op##_##pass, cuda::op##_##pass##_workspace(params), params))

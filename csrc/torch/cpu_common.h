// What the bindings of the CPU kernels share: the device of their calls, threads, errors,
// registration.
#pragma once

#include <stdexcept>
#include <string>

#include "core/parallel.h"
#include "core/status.h"
#include "cpu/dispatch.h"
#include "torch/registration.h"
#include "torch/tensor_args.h"

namespace mimkernels::binding {

// torch's thread pool as a ParallelFor.
inline void torch_pool(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, fn, context));
}

class OnCpu {
 public:
  static constexpr const char* kDevice = "cpu";

  explicit OnCpu(const Tensor&) {}
  explicit OnCpu(const torch::stable::Device& device) {
    require(device.is_cpu(), "the device is the CPU");
  }

  bool has(const Tensor& tensor) const { return tensor.is_cpu(); }

  // Contiguous, not initialised.
  Tensor empty(Sizes sizes, ScalarType type) const {
    return torch::stable::empty(
        torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
  }

  // The kernels check ids; this keeps how an error names them, with their mask or without.
  void check_ids(const std::string&, const char* name, const Tensor&, int64_t, bool masks,
                 std::optional<int64_t> = std::nullopt) {
    ids_name_ = name;
    has_masks_ = masks;
  }

 protected:
  // Throws what Python shows as IndexError, RuntimeError or ValueError.
  void raise_if_failed(const Status& status, const std::string& op) const {
    switch (status.code) {
      case StatusCode::kOk:
        return;
      case StatusCode::kIdOutOfRange: {
        const int64_t* const at = status.position;
        throw std::out_of_range(op + ": " + ids_name_ + "[" +
                                (has_masks_ ? std::to_string(at[0]) + ", " : "") +
                                std::to_string(at[1]) + ", " + std::to_string(at[2]) +
                                "] = " + std::to_string(status.value) + " is out of range [0, " +
                                std::to_string(status.limit) + ")");
      }
      case StatusCode::kOutOfMemory:
        throw std::runtime_error(op + ": out of memory for scratch space");
      case StatusCode::kUnsupported:
        throw std::invalid_argument(op + ": dtype not supported by the cpu backend");
    }
  }

 private:
  const char* ids_name_ = "";
  bool has_masks_ = false;
};

// The CPU as the Device of each kernel's binding.
namespace on_cpu {
#define MIMKERNELS_KERNEL(op, pass, Params, key)                            \
  struct op##_##pass : OnCpu {                                              \
    static constexpr const char* kOp = #op;                                 \
    using OnCpu::OnCpu;                                                     \
    void run(const Params& params) const {                                  \
      raise_if_failed(cpu_kernels().op##_##pass(params, &torch_pool), kOp); \
    }                                                                       \
  };
#include "kernels.def"
#undef MIMKERNELS_KERNEL
}  // namespace on_cpu

}  // namespace mimkernels::binding

// Registers binding::<op>_<pass> for the CPU.
#define MIMKERNELS_BIND_CPU(op, pass)          \
  MIMKERNELS_REGISTER(CPU, op##_##pass, "cpu", \
                      mimkernels::binding::op##_##pass<mimkernels::binding::on_cpu::op##_##pass>)

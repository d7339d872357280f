// What the CPU library tells of itself; the ops' bindings are csrc/ops/<op>/bind_cpu.cpp.
#include <string>

#include "cpu/dispatch.h"
#include "torch/tensor_args.h"

namespace {

std::string cpu_isa() { return mimkernels::cpu_kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimkernels, m) {
  // The name of the instruction set whose kernels this process runs.
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mimkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

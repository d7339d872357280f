// How the bindings of an op register themselves as their library is loaded. Python defines the
// schemas; here are only the implementations, so that one library serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 has it under another name
#include <torch/headeronly/util/shim_utils.h>
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace mimkernels::binding {

// By what torch finds a kernel, as csrc/kernels.def says: by the device of the call's tensors, or
// by the schema's overload alone.
enum class DispatchedBy { Tensor, None };

namespace dispatch {
#define MIMKERNELS_KERNEL(op, pass, Params, key) \
  constexpr DispatchedBy op##_##pass = DispatchedBy::key;
#include "kernels.def"
#undef MIMKERNELS_KERNEL
}  // namespace dispatch

}  // namespace mimkernels::binding

// Registers `function` as <name>.<overload>, for tensors of `device`. A name that kernels.def does
// not have cannot compile.
#define MIMKERNELS_REGISTER(device, name, overload, function)           \
  STABLE_TORCH_LIBRARY_IMPL(mimkernels, device, m) {                    \
    using mimkernels::binding::DispatchedBy;                            \
    if (mimkernels::binding::dispatch::name == DispatchedBy::Tensor) {  \
      m.impl(#name "." overload, TORCH_BOX(&function));                 \
    }                                                                   \
  }                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(mimkernels, CompositeExplicitAutograd, m) { \
    using mimkernels::binding::DispatchedBy;                            \
    if (mimkernels::binding::dispatch::name == DispatchedBy::None) {    \
      m.impl(#name "." overload, TORCH_BOX(&function));                 \
    }                                                                   \
  }

// The launchers of one instruction set, defined in csrc/ops/<op>/cpu_<pass>.cpp and collected by
// table.cpp.
#pragma once

#include "core/parallel.h"
#include "core/status.h"

namespace mimkernels {

#define MIMKERNELS_KERNEL(op, pass, Params, key) struct Params;
#include "kernels.def"
#undef MIMKERNELS_KERNEL

namespace MIMKERNELS_ISA {

#define MIMKERNELS_KERNEL(op, pass, Params, key) \
  Status op##_##pass(const Params& params, ParallelFor parallel_for);
#include "kernels.def"
#undef MIMKERNELS_KERNEL

}  // namespace MIMKERNELS_ISA
}  // namespace mimkernels

// One set of CPU kernels per instruction set, chosen once per process.
#pragma once

#include "core/parallel.h"
#include "core/status.h"

namespace mimkernels {

#define MIMKERNELS_KERNEL(op, pass, Params, key) struct Params;
#include "kernels.def"
#undef MIMKERNELS_KERNEL

struct CpuKernels {
  const char* isa;
#define MIMKERNELS_KERNEL(op, pass, Params, key) Status (*op##_##pass)(const Params&, ParallelFor);
#include "kernels.def"
#undef MIMKERNELS_KERNEL
};

// The best set this CPU runs, or the one MIMKERNELS_CPU_ISA names. Throws std::invalid_argument
// when that name is unknown, not built, or more than the CPU has.
const CpuKernels& cpu_kernels();

}  // namespace mimkernels

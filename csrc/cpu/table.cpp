// The kernels of one instruction set as a table for dispatch.cpp.
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

#define MIMKERNELS_STRING_OF(name) #name
#define MIMKERNELS_STRING(name) MIMKERNELS_STRING_OF(name)

namespace mimkernels::MIMKERNELS_ISA {

extern const CpuKernels kernel_table;
const CpuKernels kernel_table = {
    .isa = MIMKERNELS_STRING(MIMKERNELS_ISA),
#define MIMKERNELS_KERNEL(op, pass, Params, key) .op##_##pass = &op##_##pass,
#include "kernels.def"
#undef MIMKERNELS_KERNEL
};

}  // namespace mimkernels::MIMKERNELS_ISA

#include "ops/add_layer_norm/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(add_layer_norm, fwd)
MIMKERNELS_BIND_CPU(add_layer_norm, bwd)

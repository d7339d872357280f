#include "ops/received_attention/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(received_attention, fwd)

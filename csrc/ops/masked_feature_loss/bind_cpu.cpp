#include "ops/masked_feature_loss/bind.h"
#include "torch/cpu_common.h"

MIMKERNELS_BIND_CPU(masked_feature_loss, fwd)
MIMKERNELS_BIND_CPU(masked_feature_loss, bwd)

// Launchers of upsample_cross_entropy on CUDA. Torch-free: the binding has checked the tensors and
// chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/upsample_cross_entropy/params.h"

namespace mimkernels::cuda {

// The loss, statistics and totals; on `stream`, asynchronously. `workspace` holds
// upsample_cross_entropy_fwd_workspace(params) doubles. The same bits on every run and every device.
cudaError_t upsample_cross_entropy_fwd(const UpsampleCrossEntropyParams& params, double* workspace,
                                       cudaStream_t stream);

// Doubles of workspace that upsample_cross_entropy_fwd needs.
int64_t upsample_cross_entropy_fwd_workspace(const UpsampleCrossEntropyParams& params);

// dlogits of the above. `workspace` holds upsample_cross_entropy_bwd_workspace(params) floats.
cudaError_t upsample_cross_entropy_bwd(const UpsampleCrossEntropyParams& params, float* workspace,
                                       cudaStream_t stream);

// Floats of workspace that upsample_cross_entropy_bwd needs.
int64_t upsample_cross_entropy_bwd_workspace(const UpsampleCrossEntropyParams& params);

}  // namespace mimkernels::cuda

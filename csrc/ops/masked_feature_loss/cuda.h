// Launchers of masked_feature_loss on CUDA. Torch-free: the binding has checked the tensors and
// chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/masked_feature_loss/params.h"

namespace mimkernels::cuda {

// loss[a, r] = the mean over D of kind(pred[a, r] - target), or 1 minus the cosine of the two; 0
// where the id names no token; or the mean of those. On `stream`, asynchronously. `workspace` holds
// masked_feature_loss_fwd_workspace(params) doubles. The same bits on every run and every device.
cudaError_t masked_feature_loss_fwd(const MaskedFeatureLossParams& params, double* workspace,
                                    cudaStream_t stream);

// Doubles of workspace that masked_feature_loss_fwd needs.
int64_t masked_feature_loss_fwd_workspace(const MaskedFeatureLossParams& params);

// dpred of the above.
cudaError_t masked_feature_loss_bwd(const MaskedFeatureLossParams& params, cudaStream_t stream);

}  // namespace mimkernels::cuda

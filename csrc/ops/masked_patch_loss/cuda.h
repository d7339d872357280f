// Launchers of masked_patch_loss on CUDA. Torch-free: the binding has checked the tensors and
// chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/masked_patch_loss/params.h"

namespace mimkernels::cuda {

// loss[b, j] = the mean over the elements of kind(pred[b, j] - target), 0 where patch j does not
// count; or the mean of those that count. On `stream`, asynchronously. `workspace` holds
// masked_patch_loss_fwd_workspace(params) doubles. The same bits on every run and every device.
cudaError_t masked_patch_loss_fwd(const MaskedPatchLossParams& params, double* workspace,
                                  cudaStream_t stream);

// Doubles of workspace that masked_patch_loss_fwd needs.
int64_t masked_patch_loss_fwd_workspace(const MaskedPatchLossParams& params);

// dpred of the above. `workspace` holds masked_patch_loss_bwd_workspace(params) numbers.
cudaError_t masked_patch_loss_bwd(const MaskedPatchLossParams& params, int64_t* workspace,
                                  cudaStream_t stream);

// 64-bit numbers of workspace that masked_patch_loss_bwd needs.
int64_t masked_patch_loss_bwd_workspace(const MaskedPatchLossParams& params);

}  // namespace mimkernels::cuda

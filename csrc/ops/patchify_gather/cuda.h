// Launchers of patchify_gather on CUDA. Torch-free: the binding has checked the tensors and chosen
// the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/patchify_gather/params.h"

namespace mimkernels::cuda {

// out[m * B + b, k] = the pixels of patch ids[m, b, k] of image b in the order (c, t, h, w), times
// scale plus shift; on `stream`, asynchronously.
cudaError_t patchify_gather_fwd(const PatchifyGatherFwdParams& params, cudaStream_t stream);

// dimages of the above. The same bits on every run and every device.
cudaError_t patchify_gather_bwd(const PatchifyGatherBwdParams& params, cudaStream_t stream);

}  // namespace mimkernels::cuda

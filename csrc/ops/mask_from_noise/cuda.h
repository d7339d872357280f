// Launchers of mask_from_noise on CUDA. Torch-free: the binding has checked the tensors and chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/mask_from_noise/params.h"

namespace mimkernels::cuda {

// ids_shuffle, ids_restore and mask of every image, on `stream`, asynchronously.
cudaError_t mask_from_noise_fwd(const MaskFromNoiseParams& params, cudaStream_t stream);

}  // namespace mimkernels::cuda

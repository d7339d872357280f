// Launchers of random_mask on CUDA. Torch-free: the binding has checked the tensors and chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/random_mask/params.h"

namespace mimkernels::cuda {

// ids_shuffle, ids_restore and mask of every image, on `stream`, asynchronously.
cudaError_t random_mask_fwd(const RandomMaskParams& params, cudaStream_t stream);

}  // namespace mimkernels::cuda

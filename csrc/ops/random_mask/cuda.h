// Launchers of random_mask and mask_from_noise on CUDA. Torch-free: the binding has checked the
// tensors and chosen the stream.
#pragma once

#include <cuda_runtime.h>

#include "core/params.h"

namespace mimkernels::cuda {

// Tokens that the kernels rank at most: one row of keys in 32 KiB of shared memory, compared with
// itself, beyond which a sort wins.
constexpr int64_t kMostRankedTokens = 8192;

// ids_shuffle, ids_restore and mask of every image, on `stream`, asynchronously. `step`, on the
// device, is added to the offset unless null.
cudaError_t random_mask_fwd(const RandomMaskParams& params, const int64_t* step,
                            cudaStream_t stream);

// The same from given noise.
cudaError_t mask_from_noise_fwd(const MaskFromNoiseParams& params, cudaStream_t stream);

}  // namespace mimkernels::cuda

// Launchers of fill_mask_tokens on CUDA. Torch-free: the binding has checked the tensors and chosen
// the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/fill_mask_tokens/params.h"

namespace mimkernels::cuda {

// out[b, n] = mask[b, n] ? mask_token : x[b, n]; on `stream`, asynchronously.
cudaError_t fill_mask_tokens_fwd(const FillMaskTokensFwdParams& params, cudaStream_t stream);

// dx and dmask_token of the above, each where its pointer is not null. `workspace` holds
// fill_mask_tokens_bwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t fill_mask_tokens_bwd(const FillMaskTokensBwdParams& params, float* workspace,
                                 cudaStream_t stream);

// Floats of workspace that fill_mask_tokens_bwd needs.
int64_t fill_mask_tokens_bwd_workspace(const FillMaskTokensBwdParams& params);

}  // namespace mimkernels::cuda

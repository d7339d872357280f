// Launchers of restore_tokens on CUDA. Torch-free: the binding has checked the tensors and chosen
// the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/restore_tokens/params.h"

namespace mimkernels::cuda {

// out[b, p] = x[b, p] and out[b, P + i] = r < K ? x[b, P + r] : mask_token with r =
// ids_restore[b, i], each plus pos if given; on `stream`, asynchronously.
cudaError_t restore_tokens_fwd(const RestoreTokensFwdParams& params, cudaStream_t stream);

// dx, dmask_token and dpos of the above, each where its pointer is not null. `workspace` holds
// restore_tokens_bwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t restore_tokens_bwd(const RestoreTokensBwdParams& params, float* workspace,
                               cudaStream_t stream);

// Floats of workspace that restore_tokens_bwd needs.
int64_t restore_tokens_bwd_workspace(const RestoreTokensBwdParams& params);

}  // namespace mimkernels::cuda

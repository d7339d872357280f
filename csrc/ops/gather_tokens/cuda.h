// Launchers of gather_tokens on CUDA. Torch-free: the binding has checked the tensors and chosen
// the stream.
#pragma once

#include <cuda_runtime.h>

#include "ops/gather_tokens/params.h"

namespace mimkernels::cuda {

// out[m * B + b, p] = prefix[p], out[m * B + b, P + k] = x[b, i] + pos[i] with i = ids[m, b, k]; on
// `stream`, asynchronously. Ids outside [0, N) read as zeros.
cudaError_t gather_tokens_fwd(const GatherTokensFwdParams& params, cudaStream_t stream);

// dx, dpos and dprefix of the above, each where its pointer is not null. `workspace` holds
// gather_tokens_bwd_workspace(params) floats. The same bits on every run and every device.
cudaError_t gather_tokens_bwd(const GatherTokensBwdParams& params, float* workspace,
                              cudaStream_t stream);

// Floats of workspace that gather_tokens_bwd needs.
int64_t gather_tokens_bwd_workspace(const GatherTokensBwdParams& params);

}  // namespace mimkernels::cuda

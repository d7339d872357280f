// Gradients that are sums over scores: of the table of biases and of logit_scale.
#pragma once

#include <cuda_runtime.h>

#include "ops/attention/params.h"

namespace mimkernels::cuda {

// p.dtable from ds, fp32 [H, Nq, Nk], the sums of dS over the images.
cudaError_t table_gradient(const AttentionBwdParams& p, const float* ds, cudaStream_t stream);

// p.dlogit_scale from products, fp32 [groups, H, tiles], the sums of dS times S without what is added
// to S.
cudaError_t logit_scale_gradient(const AttentionBwdParams& p, const float* products, int64_t groups,
                                 int64_t tiles, cudaStream_t stream);

}  // namespace mimkernels::cuda

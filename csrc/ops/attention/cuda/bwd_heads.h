// attention_bwd of a whole head per block.
#pragma once

#include "ops/attention/cuda.h"
#include "ops/attention/cuda/head_tiling.h"

namespace mimkernels::cuda {

// With a chunk of 0 where the head does not fit, where something is added to the scores or they are
// cosines, or where MIMKERNELS_CUDA_ATTENTION_BWD is "two-passes": both kernels are here until a
// device has told which is faster.
cudaError_t choose_heads(HeadTiling& tiling, const AttentionBwdParams& p);

// Of bwd_heads_bf16.cu and bwd_heads_fp16.cu, by a tiling of choose_heads.
template <typename T>
cudaError_t attention_bwd_heads(const AttentionBwdParams& p, const HeadTiling& tiling,
                                cudaStream_t stream);

}  // namespace mimkernels::cuda

#include "ops/attention/cuda/bwd_heads.cuh"

namespace mimkernels::cuda {

template cudaError_t attention_bwd_heads<__nv_bfloat16>(const AttentionBwdParams&,
                                                        const HeadTiling&, cudaStream_t);

}  // namespace mimkernels::cuda

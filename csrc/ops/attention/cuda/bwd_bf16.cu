#include "ops/attention/cuda/bwd.cuh"

namespace mimkernels::cuda {

template cudaError_t attention_bwd_of<__nv_bfloat16>(const AttentionBwdParams&, bool, float*,
                                                     cudaStream_t);

}  // namespace mimkernels::cuda

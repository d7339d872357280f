#include "ops/attention/cuda/fwd_strips.cuh"

namespace mimkernels::cuda {

template cudaError_t attention_fwd_strips<__half>(const AttentionFwdParams&, cudaStream_t);

}  // namespace mimkernels::cuda

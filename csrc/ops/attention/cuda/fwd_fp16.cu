#include "ops/attention/cuda/fwd.cuh"

namespace mimkernels::cuda {

template cudaError_t attention_fwd_of<__half>(const AttentionFwdParams&, cudaStream_t);

}  // namespace mimkernels::cuda

// attention_fwd: fp32, and the choice of the type.
#include "ops/attention/cuda/fwd.cuh"

namespace mimkernels::cuda {

extern template cudaError_t attention_fwd_of<__half>(const AttentionFwdParams&, cudaStream_t);
extern template cudaError_t attention_fwd_of<__nv_bfloat16>(const AttentionFwdParams&,
                                                            cudaStream_t);

cudaError_t attention_fwd(const AttentionFwdParams& given, float* workspace, cudaStream_t stream) {
  AttentionFwdParams p = given;
  if (p.scores.batch * p.scores.heads * p.scores.queries == 0) {
    return cudaSuccess;
  }
  const cudaError_t error = cosine_factors(p.scores, workspace, stream);
  if (error != cudaSuccess) {
    return error;
  }
  return with_float_type(p.scores.dtype,
                         [&](auto type) { return attention_fwd_of<decltype(type)>(p, stream); });
}

}  // namespace mimkernels::cuda

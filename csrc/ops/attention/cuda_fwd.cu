// attention_fwd: fp32, and the choice of the type and of the kernel.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops/attention/cuda/fwd.cuh"

namespace mimkernels::cuda {

extern template cudaError_t attention_fwd_of<__half>(const AttentionFwdParams&, cudaStream_t);
extern template cudaError_t attention_fwd_of<__nv_bfloat16>(const AttentionFwdParams&,
                                                            cudaStream_t);
// Of ops/attention/cuda/fwd_strips.cuh.
template <typename T>
cudaError_t attention_fwd_strips(const AttentionFwdParams& p, cudaStream_t stream);
extern template cudaError_t attention_fwd_strips<__half>(const AttentionFwdParams&, cudaStream_t);
extern template cudaError_t attention_fwd_strips<__nv_bfloat16>(const AttentionFwdParams&,
                                                                cudaStream_t);

namespace {

// Which kernel takes 16-bit elements; MIMKERNELS_CUDA_ATTENTION=one-strip is for comparisons.
bool takes_strips(const AttentionFwdParams& p) {
  const char* const given = std::getenv("MIMKERNELS_CUDA_ATTENTION");
  const std::string wanted = given == nullptr || *given == 0 ? "strips" : given;
  if (wanted != "strips" && wanted != "one-strip") {
    throw std::invalid_argument("MIMKERNELS_CUDA_ATTENTION=" + wanted +
                                " is none of: strips, one-strip");
  }
  return wanted == "strips" && point_bytes(p.scores, p.positions) <= kMostPointBytes;
}

}  // namespace

cudaError_t attention_fwd(const AttentionFwdParams& given, float* workspace, cudaStream_t stream) {
  AttentionFwdParams p = given;
  if (p.scores.batch * p.scores.heads * p.scores.queries == 0) {
    return cudaSuccess;
  }
  const cudaError_t error = cosine_factors(p.scores, workspace, stream);
  if (error != cudaSuccess) {
    return error;
  }
  return with_float_type(p.scores.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!kExact<T>) {
      if (takes_strips(p)) {
        return attention_fwd_strips<T>(p, stream);
      }
    }
    return attention_fwd_of<T>(p, stream);
  });
}

}  // namespace mimkernels::cuda

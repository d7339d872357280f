// Bindings of attention and of its companions on CUDA.
#pragma once

#include <tuple>

#include "ops/attention/cuda.h"
#include "torch/attention_args.h"
#include "torch/cuda_common.h"

namespace mimkernels::binding {

// The device of the call's first tensor, which is the current one while this lives.
class OnDeviceOf {
 public:
  static constexpr const char* kBackend = "cuda";

  explicit OnDeviceOf(const Tensor& first) : first_(first), device_(first) {}
  void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    check_tensor(tensor, name, first_, sizes);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) const {
    return new_output_like(first_, sizes, type);
  }
  cudaStream_t stream() const { return current_stream(first_); }

 private:
  Tensor first_;
  OnDevice device_;
};

// A float per query, for kernels to hand to each other. Freed on return, while they may still run:
// torch's allocator reuses it in stream order.
inline Tensor row_workspace(const OnDeviceOf& place, const AttentionScores& s) {
  return place.empty({s.batch, s.heads, s.queries}, ScalarType::Float);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor bias, OptionalTensor key_mask,
    double scale, int64_t num_prefix, OptionalTensor positions, int64_t stats) {
  const OnDeviceOf place(q);
  return attention_fwd_at(place, q, k, v, bias, key_mask, scale, num_prefix, positions, stats,
                          [&](const AttentionFwdParams& params) {
                            check_cuda(cuda::attention_fwd(params, place.stream()));
                          });
}

inline Tensor attention_coef(OptionalTensor dlse, const Tensor& rows, OptionalTensor drows,
                             int64_t stats) {
  const OnDeviceOf place(rows);
  return attention_coef_at(place, dlse, rows, drows, stats, [&](const AttentionCoefParams& params) {
    check_cuda(cuda::attention_coef(params, place.stream()));
  });
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& lse_low, OptionalTensor bias, OptionalTensor key_mask,
    double scale, int64_t num_prefix, OptionalTensor positions, OptionalTensor coef, bool need_bias,
    bool packed) {
  const OnDeviceOf place(q);
  return attention_bwd_at(place, dout, q, k, v, out, lse, lse_low, bias, key_mask, scale,
                          num_prefix, positions, coef, need_bias, packed,
                          [&](const AttentionBwdParams& params) {
                            const Tensor delta = row_workspace(place, params.scores);
                            check_cuda(cuda::attention_bwd(
                                params, static_cast<float*>(delta.data_ptr()), place.stream()));
                          });
}

inline Tensor received_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& lse,
                                     OptionalTensor bias, OptionalTensor key_mask, double scale) {
  const OnDeviceOf place(q);
  return received_attention_at(place, q, k, lse, bias, key_mask, scale,
                               [&](const ReceivedAttentionParams& params) {
                                 const Tensor low = row_workspace(place, params.scores);
                                 check_cuda(cuda::received_attention_fwd(
                                     params, static_cast<float*>(low.data_ptr()), place.stream()));
                               });
}

inline Tensor head_divergence_fwd(const Tensor& q, const Tensor& k, const Tensor& lse,
                                  OptionalTensor bias, OptionalTensor key_mask, double scale) {
  const OnDeviceOf place(q);
  return head_divergence_at(
      place, q, k, lse, bias, key_mask, scale, [&](const HeadDivergenceParams& params) {
        const Tensor low = row_workspace(place, params.scores);
        check_cuda(
            cuda::head_divergence_fwd(params, static_cast<float*>(low.data_ptr()), place.stream()));
      });
}

}  // namespace mimkernels::binding

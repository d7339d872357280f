// Bindings of attention and of its companions that need no N x N memory.
#pragma once

#include <tuple>

#include "cpu/dispatch.h"
#include "torch/attention_args.h"

namespace mimkernels::binding {

struct OnCpu {
  static constexpr const char* kBackend = "cpu";
  void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    check_shape(tensor, name, sizes);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) const {
    return new_output(sizes, type);
  }
};

inline std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor bias, OptionalTensor key_mask,
    double scale, int64_t num_prefix, OptionalTensor positions, int64_t stats) {
  return attention_fwd_at(OnCpu{}, q, k, v, bias, key_mask, scale, num_prefix, positions, stats,
                          [](const AttentionFwdParams& params) {
                            raise_if_failed(cpu_kernels().attention_fwd(params, &torch_pool),
                                            "attention", "", false);
                          });
}

inline Tensor attention_coef(OptionalTensor dlse, const Tensor& rows, OptionalTensor drows,
                             int64_t stats) {
  return attention_coef_at(
      OnCpu{}, dlse, rows, drows, stats, [](const AttentionCoefParams& params) {
        raise_if_failed(cpu_kernels().attention_coef(params, &torch_pool), "attention", "", false);
      });
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& lse_low, OptionalTensor bias, OptionalTensor key_mask,
    double scale, int64_t num_prefix, OptionalTensor positions, OptionalTensor coef, bool need_bias,
    bool packed) {
  return attention_bwd_at(
      OnCpu{}, dout, q, k, v, out, lse, lse_low, bias, key_mask, scale, num_prefix, positions, coef,
      need_bias, packed, [](const AttentionBwdParams& params) {
        raise_if_failed(cpu_kernels().attention_bwd(params, &torch_pool), "attention", "", false);
      });
}

inline Tensor received_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& lse,
                                     OptionalTensor bias, OptionalTensor key_mask, double scale) {
  return received_attention_at(
      OnCpu{}, q, k, lse, bias, key_mask, scale, [](const ReceivedAttentionParams& params) {
        raise_if_failed(cpu_kernels().received_attention_fwd(params, &torch_pool),
                        "received_attention", "", false);
      });
}

inline Tensor head_divergence_fwd(const Tensor& q, const Tensor& k, const Tensor& lse,
                                  OptionalTensor bias, OptionalTensor key_mask, double scale) {
  return head_divergence_at(
      OnCpu{}, q, k, lse, bias, key_mask, scale, [](const HeadDivergenceParams& params) {
        raise_if_failed(cpu_kernels().head_divergence_fwd(params, &torch_pool), "head_divergence",
                        "", false);
      });
}

}  // namespace mimkernels::binding

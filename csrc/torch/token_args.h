// Arguments of the token ops as parameters of their kernels, on the CPU and on CUDA.
// `check(tensor, name, sizes)` refuses other sizes, kAny apart, and other devices.
#pragma once

#include "torch/tensor_args.h"

namespace mimkernels::binding {

// The tensors whose memory a call reads, alive until it returns.
struct TokenInputs {
  Tensor main;  // x or grad
  Tensor ids;   // ids, ids_restore or mask
  OptionalTensor token;
  OptionalTensor pos;
  OptionalTensor prefix;
};

template <typename Check>
void check_parameter(const Check& check, const OptionalTensor& tensor, const char* name,
                     std::initializer_list<int64_t> sizes, ScalarType type) {
  if (!tensor.has_value()) return;
  check(*tensor, name, sizes);
  check_dtype(*tensor, name, type);
}

template <typename Check>
TokenInputs set_gather_fwd(GatherTokensFwdParams& params, const Check& check, const Tensor& x,
                           const Tensor& ids, const OptionalTensor& pos,
                           const OptionalTensor& prefix) {
  check(x, "x", {kAny, kAny, kAny});
  const ScalarType type = x.scalar_type();
  params.dtype = dtype_of(type, "x", false);
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.dim = x.size(2);
  set_masks(params, check, ids, params.batch);
  check_parameter(check, pos, "pos", {params.tokens, params.dim}, type);
  check_parameter(check, prefix, "prefix", {kAny, params.dim}, type);
  params.num_prefix = prefix.has_value() ? prefix->size(0) : 0;
  TokenInputs inputs = {rows_of(x), rows_of(ids), std::nullopt, rows_of(pos), rows_of(prefix)};
  params.x = view_rows(inputs.main);
  params.ids = view_ids(inputs.ids);
  params.pos = view_rows(inputs.pos);
  params.prefix = view_rows(inputs.prefix);
  return inputs;
}

template <typename Check>
TokenInputs set_gather_bwd(GatherTokensBwdParams& params, const Check& check, const Tensor& grad,
                           const Tensor& ids, int64_t tokens, int64_t num_prefix) {
  set_masks(params, check, ids, kAny);
  check_size(tokens, "tokens", 0);
  check_size(num_prefix, "num_prefix", 0);
  params.batch = ids.size(ids.dim() - 2);
  params.tokens = tokens;
  params.num_prefix = num_prefix;
  check(grad, "grad", {params.masks * params.batch, num_prefix + params.kept, kAny});
  params.dtype = dtype_of(grad.scalar_type(), "grad", false);
  params.dim = grad.size(2);
  TokenInputs inputs = {rows_of(grad), rows_of(ids), {}, {}, {}};
  params.grad = view_rows(inputs.main);
  params.ids = view_ids(inputs.ids);
  return inputs;
}

template <typename Check>
TokenInputs set_restore_fwd(RestoreTokensFwdParams& params, const Check& check, const Tensor& x,
                            const Tensor& ids, const Tensor& token, const OptionalTensor& pos,
                            int64_t num_prefix) {
  check(x, "x", {kAny, kAny, kAny});
  const ScalarType type = x.scalar_type();
  params.dtype = dtype_of(type, "x", false);
  params.batch = x.size(0);
  params.dim = x.size(2);
  check_size(num_prefix, "num_prefix", 0);
  check_size(x.size(1), "tokens of x", num_prefix);
  params.num_prefix = num_prefix;
  params.kept = x.size(1) - num_prefix;
  check(ids, "ids_restore", {params.batch, kAny});
  check_dtype(ids, "ids_restore", ScalarType::Long);
  params.tokens = ids.size(1);
  check_parameter(check, token, "mask_token", {params.dim}, type);
  check_parameter(check, pos, "pos", {num_prefix + params.tokens, params.dim}, type);
  TokenInputs inputs = {rows_of(x), rows_of(ids), rows_of(token), rows_of(pos), {}};
  params.x = view_rows(inputs.main);
  params.ids_restore = view_ids(inputs.ids);
  params.mask_token = inputs.token->data_ptr();
  params.pos = view_rows(inputs.pos);
  return inputs;
}

template <typename Check>
TokenInputs set_restore_bwd(RestoreTokensBwdParams& params, const Check& check, const Tensor& grad,
                            const Tensor& ids, int64_t kept, int64_t num_prefix) {
  check(ids, "ids_restore", {kAny, kAny});
  check_dtype(ids, "ids_restore", ScalarType::Long);
  check_size(kept, "kept", 0);
  check_size(num_prefix, "num_prefix", 0);
  params.batch = ids.size(0);
  params.tokens = ids.size(1);
  params.kept = kept;
  params.num_prefix = num_prefix;
  check(grad, "grad", {params.batch, num_prefix + params.tokens, kAny});
  params.dtype = dtype_of(grad.scalar_type(), "grad", false);
  params.dim = grad.size(2);
  TokenInputs inputs = {rows_of(grad), rows_of(ids), {}, {}, {}};
  params.grad = view_rows(inputs.main);
  params.ids_restore = view_ids(inputs.ids);
  return inputs;
}

template <typename Check>
TokenInputs set_fill_fwd(FillMaskTokensFwdParams& params, const Check& check, const Tensor& x,
                         const Tensor& mask, const Tensor& token) {
  check(x, "x", {kAny, kAny, kAny});
  params.dtype = dtype_of(x.scalar_type(), "x", false);
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.dim = x.size(2);
  check(mask, "mask", {params.batch, params.tokens});
  check_dtype(mask, "mask", ScalarType::Bool);
  check_parameter(check, token, "mask_token", {params.dim}, x.scalar_type());
  TokenInputs inputs = {rows_of(x), rows_of(mask), rows_of(token), {}, {}};
  params.x = view_rows(inputs.main);
  params.mask = view_mask(inputs.ids);
  params.mask_token = inputs.token->data_ptr();
  return inputs;
}

template <typename Check>
TokenInputs set_fill_bwd(FillMaskTokensBwdParams& params, const Check& check, const Tensor& grad,
                         const Tensor& mask) {
  check(grad, "grad", {kAny, kAny, kAny});
  params.dtype = dtype_of(grad.scalar_type(), "grad", false);
  params.batch = grad.size(0);
  params.tokens = grad.size(1);
  params.dim = grad.size(2);
  check(mask, "mask", {params.batch, params.tokens});
  check_dtype(mask, "mask", ScalarType::Bool);
  TokenInputs inputs = {rows_of(grad), rows_of(mask), {}, {}, {}};
  params.grad = view_rows(inputs.main);
  params.mask = view_mask(inputs.ids);
  return inputs;
}

}  // namespace mimkernels::binding

// Binds the CUDA kernels to torch. Python defines the schemas; here are only the implementations,
// so that one library serves every torch from 2.10 on.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "../cuda/gather_tokens.h"
#include "tensor_args.h"

namespace mimkernels::binding {
namespace {

// Rank, sizes (kAny: any) and device: every tensor of a call lies on the first one's.
void check_tensor(const Tensor& tensor, const char* name, const Tensor& first,
                  std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool good = sizes.size() == expected.size();
  size_t d = 0;
  for (const int64_t size : expected) {
    good = good && (size == kAny || sizes[d] == size);
    ++d;
  }
  check_argument(good, std::string(name) + " has shape " + shape_text(sizes.data(), sizes.size()) +
                           ", expected " + shape_text(expected.begin(), expected.size()));
  check_argument(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(),
                 std::string(name) + " is not on the CUDA device of the first tensor");
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor new_output_like(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

Tensor gather_tokens_fwd(const Tensor& x_any, const Tensor& ids_any, OptionalTensor pos_any,
                         OptionalTensor prefix_any) {
  check_tensor(x_any, "x", x_any, {kAny, kAny, kAny});
  const ScalarType type = x_any.scalar_type();
  GatherTokensFwdParams params;
  params.dtype = dtype_of(type, "x", false);
  params.batch = x_any.size(0);
  params.tokens = x_any.size(1);
  params.dim = x_any.size(2);
  check_tensor(ids_any, "ids", x_any, {kAny, params.batch, kAny});
  check_dtype(ids_any, "ids", ScalarType::Long);
  params.masks = ids_any.size(0);
  params.kept = ids_any.size(2);
  if (pos_any.has_value()) {
    check_tensor(*pos_any, "pos", x_any, {params.tokens, params.dim});
    check_dtype(*pos_any, "pos", type);
  }
  if (prefix_any.has_value()) {
    check_tensor(*prefix_any, "prefix", x_any, {kAny, params.dim});
    check_dtype(*prefix_any, "prefix", type);
    params.num_prefix = prefix_any->size(0);
  }
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = rows_of(x_any);
  const Tensor ids = rows_of(ids_any);
  const OptionalTensor pos = rows_of(pos_any);
  const OptionalTensor prefix = rows_of(prefix_any);
  params.x = view_rows(x);
  params.ids = view_ids(ids);
  params.pos = view_rows(pos);
  params.prefix = view_rows(prefix);
  Tensor out = new_output_like(
      x, {params.masks * params.batch, params.num_prefix + params.kept, params.dim}, type);
  params.out = out.data_ptr();
  STD_CUDA_CHECK(cuda::gather_tokens_fwd(params, current_stream(x)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_tokens_bwd(const Tensor& grad_any, const Tensor& ids_any,
                                                     int64_t tokens, int64_t num_prefix,
                                                     bool need_x, bool need_pos, bool need_prefix) {
  check_tensor(ids_any, "ids", grad_any, {kAny, kAny, kAny});
  check_dtype(ids_any, "ids", ScalarType::Long);
  check_size(tokens, "tokens", 0);
  check_size(num_prefix, "num_prefix", 0);
  GatherTokensBwdParams params;
  params.masks = ids_any.size(0);
  params.batch = ids_any.size(1);
  params.kept = ids_any.size(2);
  params.tokens = tokens;
  params.num_prefix = num_prefix;
  check_tensor(grad_any, "grad", grad_any,
               {params.masks * params.batch, num_prefix + params.kept, kAny});
  const ScalarType type = grad_any.scalar_type();
  params.dtype = dtype_of(type, "grad", false);
  params.dim = grad_any.size(2);
  const torch::stable::accelerator::DeviceGuard guard(grad_any.get_device_index());
  const Tensor grad = rows_of(grad_any);
  const Tensor ids = rows_of(ids_any);
  params.grad = view_rows(grad);
  params.ids = view_ids(ids);
  const auto output = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return new_output_like(grad, needed ? sizes : std::initializer_list<int64_t>{0}, type);
  };
  Tensor dx = output(need_x, {params.batch, tokens, params.dim});
  Tensor dpos = output(need_pos, {tokens, params.dim});
  Tensor dprefix = output(need_prefix, {num_prefix, params.dim});
  params.dx = output_ptr(need_x, dx);
  params.dpos = output_ptr(need_pos, dpos);
  params.dprefix = output_ptr(need_prefix, dprefix);
  // Freed on return, while the kernels may still run: torch's allocator reuses it in stream order.
  const Tensor workspace =
      new_output_like(grad, {cuda::gather_tokens_bwd_workspace(params)}, ScalarType::Float);
  STD_CUDA_CHECK(cuda::gather_tokens_bwd(params, static_cast<float*>(workspace.data_ptr()),
                                         current_stream(grad)));
  return {dx, dpos, dprefix};
}

}  // namespace
}  // namespace mimkernels::binding

STABLE_TORCH_LIBRARY_IMPL(mimkernels, CUDA, m) {
  namespace binding = mimkernels::binding;
  m.impl("gather_tokens_fwd.cuda", TORCH_BOX(&binding::gather_tokens_fwd));
  m.impl("gather_tokens_bwd.cuda", TORCH_BOX(&binding::gather_tokens_bwd));
}

// Arguments of the native ops: torch tensors, checked, as the parameters of kernels.
//
// Python has checked the meaning of a call and says what is wrong with it. What is checked here, once
// for both devices, keeps a direct call of torch.ops.mimkernels from reading memory that is not
// there: rank, sizes, dtype and device of every tensor, and the numbers that sizes depend on.
//
// A Device (OnCpu in cpu_common.h, OnCuda in cuda_common.h) says where the tensors of a call lie,
// makes the outputs and runs the kernel:
//   static constexpr const char* kOp, kDevice;
//   bool has(const Tensor&) const;
//   Tensor empty(Sizes, ScalarType) const;
//   void check_ids(op, const char* name, const Tensor& ids, int64_t limit, bool masks, allowed = {});
//   void run(const Params&) const;
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "core/params.h"

namespace mimkernels::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

// A size that may be anything.
constexpr int64_t kAnySize = -1;

// Throws what Python shows as ValueError, unless the fact holds.
inline void require(bool holds, const char* fact) {
  if (!holds) throw std::invalid_argument(std::string("a native op requires: ") + fact);
}

inline std::string shape_text(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] == kAnySize ? "*" : std::to_string(sizes[i]);
  }
  return text + "]";
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  if (tensor.scalar_type() == expected) return;
  throw std::invalid_argument(std::string(name) + " has dtype " +
                              torch::headeronly::toString(tensor.scalar_type()) + ", expected " +
                              torch::headeronly::toString(expected));
}

// Rank, sizes (kAnySize: any) and device, and the dtype where one is given.
template <typename Device>
void check(const Device& device, const Tensor& tensor, const char* name, Sizes expected,
           std::optional<ScalarType> type = std::nullopt) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  size_t d = 0;
  for (const int64_t size : expected) {
    same = same && (size == kAnySize || sizes[d] == size);
    ++d;
  }
  if (!same) {
    throw std::invalid_argument(std::string(name) + " has shape " +
                                shape_text(sizes.data(), sizes.size()) + ", expected " +
                                shape_text(expected.begin(), expected.size()));
  }
  if (!device.has(tensor)) {
    throw std::invalid_argument(std::string(name) +
                                " is not on the device of the call, or on none that " +
                                Device::kDevice + " takes");
  }
  if (type.has_value()) check_dtype(tensor, name, *type);
}

// The tensor itself if its last dim is contiguous, else a contiguous copy.
inline Tensor last_dim_contiguous(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  if (rank == 0 || tensor.size(rank - 1) <= 1 || tensor.stride(rank - 1) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

// The argument, checked, with its last dim contiguous.
template <typename Device>
Tensor take(const Device& device, const Tensor& tensor, const char* name, Sizes sizes,
            std::optional<ScalarType> type = std::nullopt) {
  check(device, tensor, name, sizes, type);
  return last_dim_contiguous(tensor);
}

template <typename Device>
OptionalTensor take(const Device& device, const OptionalTensor& tensor, const char* name,
                    Sizes sizes, std::optional<ScalarType> type = std::nullopt) {
  if (!tensor.has_value()) return std::nullopt;
  return take(device, *tensor, name, sizes, type);
}

// The argument, checked, contiguous.
template <typename Device>
Tensor take_contiguous(const Device& device, const Tensor& tensor, const char* name, Sizes sizes,
                       ScalarType type) {
  check(device, tensor, name, sizes, type);
  return torch::stable::contiguous(tensor);
}

inline DType dtype_of(ScalarType type, const char* name, bool allow_uint8 = false) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Byte:
      if (allow_uint8) return DType::kUInt8;
      break;
    default:
      break;
  }
  throw std::invalid_argument(
      std::string(name) + " has dtype " + torch::headeronly::toString(type) +
      ", expected float32, bfloat16, float16" + (allow_uint8 ? " or uint8" : ""));
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  return dtype_of(tensor.scalar_type(), name);
}

inline Rows view_rows(const Tensor& tensor) {
  Rows rows;
  rows.data = tensor.data_ptr();
  rows.given = true;
  const int64_t rank = tensor.dim();
  rows.stride0 = rank == 3 ? tensor.stride(0) : 0;
  rows.stride1 = rank >= 2 ? tensor.stride(rank - 2) : 0;
  return rows;
}

inline Rows view_rows(const OptionalTensor& tensor) {
  return tensor.has_value() ? view_rows(*tensor) : Rows{};
}

inline Ids view_ids(const Tensor& tensor) {
  Ids ids;
  ids.data = static_cast<const int64_t*>(tensor.data_ptr());
  ids.given = true;
  const int64_t rank = tensor.dim();
  ids.stride0 = rank == 3 ? tensor.stride(0) : 0;
  ids.stride1 = tensor.stride(rank - 2);
  return ids;
}

// [B, N] bool, the last dim contiguous.
inline BoolMask view_mask(const OptionalTensor& mask) {
  BoolMask view;
  if (!mask.has_value()) return view;
  view.data = static_cast<const uint8_t*>(mask->data_ptr());
  view.given = true;
  view.stride0 = mask->stride(0);
  return view;
}

// Takes ids [B, K] or, for several masks, [M, B, K], and sets ids, masks and kept.
template <typename Params, typename Device>
Tensor take_ids(Params& params, const Device& device, const Tensor& ids_any, int64_t batch) {
  const bool several = ids_any.dim() == 3;
  const Tensor ids =
      several ? take(device, ids_any, "ids", {kAnySize, batch, kAnySize}, ScalarType::Long)
              : take(device, ids_any, "ids", {batch, kAnySize}, ScalarType::Long);
  params.masks = several ? ids.size(0) : 1;
  params.kept = ids.size(ids.dim() - 1);
  params.ids = view_ids(ids);
  return ids;
}

// An output that was not asked for has no elements.
template <typename Device>
Tensor empty_if(const Device& device, bool needed, Sizes sizes, ScalarType type) {
  return needed ? device.empty(sizes, type) : device.empty({0}, type);
}

// Null where the output was not asked for. One without elements may be null, too: there is nothing
// to write.
inline void* output_ptr(bool needed, const Tensor& tensor) {
  return needed ? tensor.data_ptr() : nullptr;
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

}  // namespace mimkernels::binding

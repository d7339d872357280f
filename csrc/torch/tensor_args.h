// Checks and conversions between torch tensors and kernel parameters, for the bindings.
//
// Python has checked the meaning of the arguments; what is checked here keeps a wrong direct call
// of an op from reading memory that is not there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/params.h"
#include "core/status.h"

namespace mimkernels::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// torch's thread pool as a ParallelFor.
inline void torch_pool(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, fn, context));
}

// A size that may be anything.
constexpr int64_t kAny = -1;

inline std::string shape_text(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] == kAny ? "*" : std::to_string(sizes[i]);
  }
  return text + "]";
}

inline void check_argument(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

// Rank, sizes (kAny: any) and device.
inline void check_shape(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool good = sizes.size() == expected.size();
  size_t d = 0;
  for (const int64_t size : expected) {
    good = good && (size == kAny || sizes[d] == size);
    ++d;
  }
  if (!good) {
    throw std::invalid_argument(std::string(name) + " has shape " +
                                shape_text(sizes.data(), sizes.size()) + ", expected " +
                                shape_text(expected.begin(), expected.size()));
  }
  if (!tensor.is_cpu()) {
    throw std::invalid_argument(std::string(name) +
                                " is not on the CPU; the cpu backend takes CPU "
                                "tensors only");
  }
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  if (tensor.scalar_type() == expected) return;
  throw std::invalid_argument(std::string(name) + " has dtype " +
                              torch::headeronly::toString(tensor.scalar_type()) + ", expected " +
                              torch::headeronly::toString(expected));
}

inline DType dtype_of(ScalarType type, const char* name, bool allow_uint8) {
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

// Sizes that an op takes as plain numbers.
inline void check_size(int64_t size, const char* name, int64_t least) {
  if (size < least) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(size) +
                                ", expected at least " + std::to_string(least));
  }
}

// The tensor itself if its last dim is contiguous, else a contiguous copy.
inline Tensor rows_of(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  if (rank == 0 || tensor.size(rank - 1) <= 1 || tensor.stride(rank - 1) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline OptionalTensor rows_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(rows_of(*tensor)) : std::nullopt;
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

// Masks and kept tokens of ids [B, K] or, for several masks, [M, B, K].
template <typename Params, typename Check>
void set_masks(Params& params, const Check& check, const Tensor& ids, int64_t batch) {
  const bool several = ids.dim() == 3;
  if (several) {
    check(ids, "ids", {kAny, batch, kAny});
  } else {
    check(ids, "ids", {batch, kAny});
  }
  check_dtype(ids, "ids", ScalarType::Long);
  params.masks = several ? ids.size(0) : 1;
  params.kept = ids.size(ids.dim() - 1);
}

// [B, N] bool, the last dim contiguous.
inline BoolMask view_mask(const Tensor& mask) {
  BoolMask view;
  view.data = static_cast<const uint8_t*>(mask.data_ptr());
  view.given = true;
  view.stride0 = mask.stride(0);
  return view;
}

// A contiguous CPU tensor, not initialised.
inline Tensor new_output(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                              type);
}

inline Tensor new_output_if(bool needed, std::initializer_list<int64_t> sizes, ScalarType type) {
  return needed ? new_output(sizes, type) : new_output({0}, type);
}

// Null where the output was not asked for. One without elements may be null, too: there is nothing
// to write.
inline void* output_ptr(bool needed, const Tensor& tensor) {
  return needed ? tensor.data_ptr() : nullptr;
}

// Throws what Python shows as IndexError, MemoryError's closest kin, or ValueError.
inline void raise_if_failed(const Status& status, const char* op, const char* ids_name,
                            bool has_masks) {
  switch (status.code) {
    case StatusCode::kOk:
      return;
    case StatusCode::kIdOutOfRange: {
      std::string place = std::string(ids_name) + "[";
      if (has_masks) place += std::to_string(status.position[0]) + ", ";
      place += std::to_string(status.position[1]) + ", " + std::to_string(status.position[2]) + "]";
      throw std::out_of_range(std::string(op) + ": " + place + " = " +
                              std::to_string(status.value) + " is out of range [0, " +
                              std::to_string(status.limit) + ")");
    }
    case StatusCode::kOutOfMemory:
      throw std::runtime_error(std::string(op) + ": out of memory for scratch space");
    case StatusCode::kUnsupported:
      throw std::invalid_argument(std::string(op) + ": dtype not supported by the cpu backend");
  }
}

}  // namespace mimkernels::binding

// What both directions of add_layer_norm share: words of rows, and the types that occur together.
#pragma once

#include "cuda/rows.cuh"
#include "ops/add_layer_norm/params.h"

namespace mimkernels::cuda {

template <typename T>
constexpr DType kDTypeOf = std::is_same_v<T, float>    ? DType::kFloat32
                           : std::is_same_v<T, __half> ? DType::kFloat16
                                                       : DType::kBFloat16;

// The float types of the stream, the branch and the normalised rows: those that occur together have
// kernels of their own, all others the ones that branch as they load and store.
template <typename X, typename Y, typename Out>
struct FixedTypes {
  static constexpr DType x = kDTypeOf<X>;
  static constexpr DType y = kDTypeOf<Y>;
  static constexpr DType out = kDTypeOf<Out>;
};
struct AnyTypes {
  DType x;
  DType y;
  DType out;
};

// A word of VEC elements, as it lies in memory: all bits of fp32 elements, half as many of others. It
// is converted late, so that loads are in flight together.
template <int VEC>
using RawWord = uint32_t[VEC];

// Word `word` of `row`.
template <int VEC>
__device__ __forceinline__ void load_raw(RawWord<VEC>& raw, const void* row, DType dtype,
                                         int64_t word) {
  const auto load = [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    constexpr int kStep = kBytes < 16 ? kBytes : 16;
    using W = typename WordOf<kStep>::type;
    const W* const words = static_cast<const W*>(row) + word * (kBytes / kStep);
#pragma unroll
    for (int i = 0; i < kBytes / kStep; ++i) {
      const W bits = __ldg(words + i);
      memcpy(reinterpret_cast<unsigned char*>(raw) + i * kStep, &bits, kStep);
    }
  };
  if (dtype == DType::kFloat32) {
    load(std::integral_constant<int, 4 * VEC>{});
  } else {
    load(std::integral_constant<int, 2 * VEC>{});
  }
}

template <int VEC>
__device__ __forceinline__ void widen(float (&out)[VEC], const RawWord<VEC>& raw, DType dtype) {
  const auto convert = [&](auto type) {
    decltype(type) elements[VEC];
    memcpy(elements, raw, sizeof(elements));
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      out[e] = to_float(elements[e]);
    }
  };
  if (dtype == DType::kFloat32) {
    convert(float{});
  } else if (dtype == DType::kBFloat16) {
    convert(__nv_bfloat16{});
  } else {
    convert(__half{});
  }
}

// VEC elements of a vector of parameters; without one, `otherwise`.
template <int VEC>
__device__ __forceinline__ void load_parameter(float (&out)[VEC], bool given, const float* data,
                                               int64_t word, float otherwise) {
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    out[e] = otherwise;
  }
  if (given) {
    constexpr int kStep = VEC < 4 ? VEC : 4;
    using W = Word<float, kStep>;
#pragma unroll
    for (int i = 0; i < VEC / kStep; ++i) {
      // Not __ldg: of what cannot change the compiler keeps a row of registers.
      const W bits = reinterpret_cast<const W*>(data)[word * (VEC / kStep) + i];
      memcpy(out + i * kStep, &bits, sizeof(bits));
    }
  }
}

// Rounds the values to dtype; stores them as word `word` of `row` unless that is null.
template <int VEC>
__device__ __forceinline__ void store_word(void* row, DType dtype, int64_t word,
                                           float (&values)[VEC]) {
  const auto store = [&](auto type) {
    using T = decltype(type);
    constexpr int kBytes = static_cast<int>(sizeof(T)) * VEC;
    constexpr int kStep = kBytes < 16 ? kBytes : 16;
    using W = typename WordOf<kStep>::type;
    T elements[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      elements[e] = from_float<T>(values[e]);
      values[e] = to_float(elements[e]);
    }
    if (row == nullptr) {
      return;
    }
    W* const words = static_cast<W*>(row) + word * (kBytes / kStep);
#pragma unroll
    for (int i = 0; i < kBytes / kStep; ++i) {
      W bits;
      memcpy(&bits, reinterpret_cast<const unsigned char*>(elements) + i * kStep, kStep);
      words[i] = bits;
    }
  };
  if (dtype == DType::kFloat32) {
    store(float{});
  } else if (dtype == DType::kBFloat16) {
    store(__nv_bfloat16{});
  } else {
    store(__half{});
  }
}

__device__ __forceinline__ const void* row_of(const Rows& rows, DType dtype, int64_t i, int64_t j) {
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<const unsigned char*>(rows.data) +
         (i * rows.stride0 + j * rows.stride1) * size;
}
// Of contiguous rows; null if there are none.
__device__ __forceinline__ void* row_of(void* data, DType dtype, int64_t row, int64_t dim) {
  return data == nullptr
             ? nullptr
             : static_cast<unsigned char*>(data) + row * dim * (dtype == DType::kFloat32 ? 4 : 2);
}

// Whether words of `vec` elements reach these rows of `dim`; rows that are not there are no
// hindrance.
inline bool words_fit(const Rows& rows, int64_t dim, DType dtype, int vec) {
  const int64_t size = element_size(dtype);
  const int64_t bytes = vec * size < 16 ? vec * size : 16;
  return dim % vec == 0 && rows_aligned(rows.data, rows.stride0, rows.stride1, size, bytes);
}

// Calls body(types) with the FixedTypes of a call, or says that it has none.
template <typename Body>
bool with_fixed_types(const AnyTypes& types, cudaError_t& error, const Body& body) {
  bool known = false;
  const auto of = [&](auto x, auto y, auto out) {
    using Types = FixedTypes<decltype(x), decltype(y), decltype(out)>;
    if (types.x == Types::x && types.y == Types::y && types.out == Types::out) {
      known = true;
      error = body(Types{});
    }
  };
  const auto of_half = [&](auto half) {
    of(half, half, half);
    of(float{}, half, half);
    of(float{}, half, float{});
    of(float{}, float{}, half);
  };
  of(float{}, float{}, float{});
  of_half(__nv_bfloat16{});
  of_half(__half{});
  return known;
}

}  // namespace mimkernels::cuda

// What device.cuh declares, for the host.
#pragma once

#include <cfloat>
#include <cmath>
#include <tuple>
#include <utility>

#include "emulation/emulation.h"

namespace mimkernels::cuda {

namespace detail {

// The arguments are copied for each thread, as a kernel's parameters are; that copy is none of the
// kernel's accesses.
template <typename... Params>
struct Call {
  void (*kernel)(Params...);
  std::tuple<Params...> arguments;

  __attribute__((no_sanitize("thread", "undefined"))) static void enter(void* call) {
    Call& self = *static_cast<Call*>(call);
    std::apply(self.kernel, self.arguments);
  }
};

}  // namespace detail

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t, Args&&... args) {
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535 || threads <= 0 || threads > emulation::kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes < 0 || shared_bytes > emulation::kMostSharedBytes) {
    return cudaErrorInvalidValue;
  }
  detail::Call<Params...> call{kernel, {static_cast<Params>(args)...}};
  emulation::run({reinterpret_cast<const void*>(kernel),
                  {grid.x, grid.y, grid.z},
                  threads,
                  shared_bytes,
                  &call.enter,
                  &call});
  return cudaSuccess;
}

__forceinline__ unsigned char* shared_memory() { return emulation::shared_memory(); }

__forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  emulation::copy_async(shared, global, valid);
}
__forceinline__ void copy_async_commit() { emulation::copy_async_commit(); }
template <int PENDING>
__forceinline__ void copy_async_wait() {
  emulation::copy_async_wait(PENDING);
}

__forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices(emulation::Wait::kLoadMatrices, r, row);
}
__forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices(emulation::Wait::kLoadMatricesTransposed, r, row);
}

template <typename T>
__forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr auto kKind = std::is_same_v<T, __half> ? emulation::Wait::kMultiplyAddHalf
                                                   : emulation::Wait::kMultiplyAddBFloat16;
  emulation::multiply_add(kKind, d, a, b0, b1);
}
__forceinline__ void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  emulation::multiply_add(emulation::Wait::kMultiplyAddTf32, d, a, b0, b1);
}

__forceinline__ uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fffffffu : (bits + 0x1000u) & ~0x1fffu;
}

__forceinline__ float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.0f : y;
}
__forceinline__ float sqrt_fast(float x) { return x < FLT_MIN && x > -FLT_MIN ? 0.0f : sqrtf(x); }

__forceinline__ float reciprocal_fast(float x) {
  const float y = fabsf(x) < FLT_MIN ? copysignf(INFINITY, x) : 1.0f / x;
  return fabsf(y) < FLT_MIN ? copysignf(0.0f, y) : y;
}

}  // namespace mimkernels::cuda

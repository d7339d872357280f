// Stands in for CUDA's header of this name where kernels are compiled for the host: the part of
// CUDA C++ that our kernels use. What is missing is refused by the compiler; atomics, __shared__
// variables and __activemask are left out on purpose.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// ---- Vectors ----
#define MIMKERNELS_VECTOR(T, name, bytes2, bytes4)                            \
  struct alignas(bytes2) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                              \
  struct alignas(bytes4) name##4 { T x, y, z, w; };                           \
  __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  __forceinline__ name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
MIMKERNELS_VECTOR(unsigned char, uchar, 2, 4)
MIMKERNELS_VECTOR(unsigned short, ushort, 4, 8)
MIMKERNELS_VECTOR(int, int, 8, 16)
MIMKERNELS_VECTOR(unsigned, uint, 8, 16)
MIMKERNELS_VECTOR(float, float, 8, 16)
#undef MIMKERNELS_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- Where a thread is ----
#define threadIdx (::mimkernels::emulation::thread_index())
#define blockIdx (::mimkernels::emulation::block_index())
#define blockDim (::mimkernels::emulation::block_size())
#define gridDim (::mimkernels::emulation::grid_size())
constexpr int warpSize = ::mimkernels::emulation::kWarpSize;

// ---- Barriers, votes, shuffles ----
__forceinline__ void __syncthreads() {
  ::mimkernels::emulation::wait_for_block(::mimkernels::emulation::Wait::kBlock, 0);
}
__forceinline__ int __syncthreads_and(int predicate) {
  return ::mimkernels::emulation::wait_for_block(::mimkernels::emulation::Wait::kBlockAnd,
                                                 predicate);
}
__forceinline__ int __syncthreads_or(int predicate) {
  return ::mimkernels::emulation::wait_for_block(::mimkernels::emulation::Wait::kBlockOr,
                                                 predicate);
}
__forceinline__ int __syncthreads_count(int predicate) {
  return ::mimkernels::emulation::wait_for_block(::mimkernels::emulation::Wait::kBlockCount,
                                                 predicate);
}
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
  ::mimkernels::emulation::wait_for_warp(mask);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::mimkernels::emulation::ballot(mask, predicate != 0);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return ::mimkernels::emulation::ballot(mask, predicate != 0) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return ::mimkernels::emulation::ballot(mask, predicate == 0) == 0;
}

namespace mimkernels::emulation {

template <typename T>
__forceinline__ T shuffle_value(Wait kind, unsigned mask, T value, int argument, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace mimkernels::emulation

template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return ::mimkernels::emulation::shuffle_value(::mimkernels::emulation::Wait::kShuffle, mask,
                                                value, lane, width);
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return ::mimkernels::emulation::shuffle_value(::mimkernels::emulation::Wait::kShuffleUp, mask,
                                                value, static_cast<int>(delta), width);
}
template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return ::mimkernels::emulation::shuffle_value(::mimkernels::emulation::Wait::kShuffleDown, mask,
                                                value, static_cast<int>(delta), width);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  return ::mimkernels::emulation::shuffle_value(::mimkernels::emulation::Wait::kShuffleXor, mask,
                                                value, bits, width);
}

// ---- Loads and stores with a cache hint ----
template <typename T>
__forceinline__ T __ldg(const T* from) {
  return *from;
}
template <typename T>
__forceinline__ T __ldcg(const T* from) {
  return *from;
}
template <typename T>
__forceinline__ T __ldcs(const T* from) {
  return *from;
}
template <typename T>
__forceinline__ void __stcg(T* to, T value) {
  *to = value;
}
template <typename T>
__forceinline__ void __stcs(T* to, T value) {
  *to = value;
}

// ---- Integers ----
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(long long x) { return __builtin_ffsll(x); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
__forceinline__ unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) {
    reversed |= (x >> bit & 1u) << (31 - bit);
  }
  return reversed;
}
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
__forceinline__ int __mulhi(int a, int b) {
  return static_cast<int>(static_cast<int64_t>(a) * b >> 32);
}

#define MIMKERNELS_MIN_MAX(T)                               \
  __forceinline__ T min(T a, T b) { return b < a ? b : a; } \
  __forceinline__ T max(T a, T b) { return a < b ? b : a; }
MIMKERNELS_MIN_MAX(int)
MIMKERNELS_MIN_MAX(unsigned)
MIMKERNELS_MIN_MAX(long)
MIMKERNELS_MIN_MAX(unsigned long)
MIMKERNELS_MIN_MAX(long long)
MIMKERNELS_MIN_MAX(unsigned long long)
#undef MIMKERNELS_MIN_MAX
// With one NaN the other argument, as CUDA has it.
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__forceinline__ double min(double a, double b) { return fmin(a, b); }
__forceinline__ double max(double a, double b) { return fmax(a, b); }

// ---- Floats ----
__forceinline__ float __uint_as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
__forceinline__ unsigned __float_as_uint(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
__forceinline__ float __int_as_float(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits));
}
__forceinline__ int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }

__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// The quick functions of the device are less exact than these. A divisor above 2^126 gives zero.
__forceinline__ float __fdividef(float a, float b) {
  return fabsf(b) > 0x1p126f && !isinf(b) && !isnan(a) ? (isinf(a) ? NAN : 0.0f) : a / b;
}
__forceinline__ float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
// Macros, because the C library has functions of these names.
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __powf powf
#define rsqrtf(x) (static_cast<float>(1.0 / sqrt(static_cast<double>(x))))

// ---- Runtime ----
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unknown error";
}
// Launches report their errors themselves.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small device of compute capability 8.0.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = ::mimkernels::emulation::kMostSharedBytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

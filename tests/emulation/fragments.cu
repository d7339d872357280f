// Matrix fragments, collectives and 16-bit floats, by themselves: the tests compare with torch.
#include <cstring>

#include "cuda/attention/groups.cuh"
#include "exported.h"

namespace {

using mimkernels::cuda::launch;
using mimkernels::cuda::load_matrices;
using mimkernels::cuda::load_matrices_transposed;
using mimkernels::cuda::multiply_add;
using mimkernels::cuda::multiply_add_tf32;
using mimkernels::cuda::shared_memory;
using mimkernels::cuda::to_tf32;

// grid: one warp
// in:   a [16, 16], b [16, 8] of T, d [16, 8]
// out:  d + a b; the fragments come from shared memory, as kernels load them
template <typename T>
__global__ void product_kernel(const T* a, const T* b, float* d) {
  T* const shared_a = reinterpret_cast<T*>(shared_memory());
  T* const shared_b = shared_a + 256;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    shared_a[i] = a[i];
  }
  for (int i = lane; i < 128; i += 32) {
    shared_b[i] = b[i];
  }
  __syncthreads();
  uint32_t fragment_a[4];
  load_matrices(fragment_a, shared_a + lane % 16 * 16 + lane / 16 * 8);
  uint32_t fragment_b[4];  // b twice
  load_matrices_transposed(fragment_b, shared_b + lane % 16 * 8);
  const int g = lane / 4;
  const int t = 2 * (lane % 4);
  float sums[4] = {d[g * 8 + t], d[g * 8 + t + 1], d[(g + 8) * 8 + t], d[(g + 8) * 8 + t + 1]};
  multiply_add<T>(sums, fragment_a, fragment_b[0], fragment_b[1]);
  d[g * 8 + t] = sums[0];
  d[g * 8 + t + 1] = sums[1];
  d[(g + 8) * 8 + t] = sums[2];
  d[(g + 8) * 8 + t + 1] = sums[3];
}

// grid: two warps
// in:   w [16, 16] fp32, b [16, 8] of T, d [16, 8]
// out:  d + w^T b: one warp stores w as it has a group, the other loads it transposed
template <typename T>
__global__ void transposed_group_kernel(const float* w, const T* b, float* d) {
  T* const group = reinterpret_cast<T*>(shared_memory());
  T* const shared_b = group + 256;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = 2 * (lane % 4);
  for (int i = threadIdx.x; i < 128; i += 64) {
    shared_b[i] = b[i];
  }
  if (threadIdx.x < 32) {
    float of_lane[2][4];
    for (int i = 0; i < 8; ++i) {
      of_lane[i / 4][i % 4] = w[(g + i % 4 / 2 * 8) * 16 + i / 4 * 8 + t + i % 2];
    }
    uint32_t packed[4];
    mimkernels::cuda::pack_group<T>(packed, of_lane);
    mimkernels::cuda::store_group(group, packed);
  }
  __syncthreads();
  if (threadIdx.x >= 32) {
    uint32_t left[4];
    mimkernels::cuda::load_transposed_group(left, group);
    uint32_t right[4];  // b twice
    load_matrices_transposed(right, shared_b + lane % 16 * 8);
    float sums[4] = {d[g * 8 + t], d[g * 8 + t + 1], d[(g + 8) * 8 + t], d[(g + 8) * 8 + t + 1]};
    multiply_add<T>(sums, left, right[0], right[1]);
    d[g * 8 + t] = sums[0];
    d[g * 8 + t + 1] = sums[1];
    d[(g + 8) * 8 + t] = sums[2];
    d[(g + 8) * 8 + t + 1] = sums[3];
  }
}

// The same for fp32 a [16, 8], b [8, 8], as TF32: rounded, or truncated by the unit itself.
__global__ void product_tf32_kernel(const float* a, const float* b, float* d, bool rounded) {
  const int g = threadIdx.x / 4;
  const int t = threadIdx.x % 4;
  const auto operand = [rounded](float x) { return rounded ? to_tf32(x) : __float_as_uint(x); };
  const uint32_t fragment_a[4] = {operand(a[g * 8 + t]), operand(a[(g + 8) * 8 + t]),
                                  operand(a[g * 8 + t + 4]), operand(a[(g + 8) * 8 + t + 4])};
  float* const top = d + g * 8 + 2 * t;
  float* const bottom = top + 64;
  float sums[4] = {top[0], top[1], bottom[0], bottom[1]};
  multiply_add_tf32(sums, fragment_a, operand(b[t * 8 + g]), operand(b[(t + 4) * 8 + g]));
  top[0] = sums[0];
  top[1] = sums[1];
  bottom[0] = sums[2];
  bottom[1] = sums[3];
}

// out [4, 32, 2]: the fragments of four 8x8 matrices [4, 8, 8] of 16 bits.
__global__ void load_kernel(const uint16_t* matrices, uint32_t* out, bool transposed) {
  uint16_t* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    shared[i] = matrices[i];
  }
  __syncwarp();
  uint32_t r[4];
  if (transposed) {
    load_matrices_transposed(r, shared + lane * 8);
  } else {
    load_matrices(r, shared + lane * 8);
  }
  for (int m = 0; m < 4; ++m) {
    out[m * 32 + lane] = r[m];
  }
}

// out [8, threads]: what each collective gives, of values that tell their thread.
__global__ void collectives_kernel(int* out) {
  constexpr unsigned kWarpMask = 0xffffffffu;
  const int t = threadIdx.x;
  const int count = blockDim.x;
  out[t] = __shfl_sync(kWarpMask, 100 + t, 35 - t % 3);
  out[count + t] = __shfl_up_sync(kWarpMask, 100 + t, 3, 8);
  out[2 * count + t] = __shfl_down_sync(kWarpMask, 100 + t, 3, 16);
  out[3 * count + t] = __shfl_xor_sync(kWarpMask, 100 + t, 5);
  out[4 * count + t] = static_cast<int>(__ballot_sync(kWarpMask, t % 3 == 0));
  out[5 * count + t] = __syncthreads_count(t % 3 == 0);
  out[6 * count + t] = __syncthreads_or(t == 40) * 2 + __syncthreads_and(t != 40);
  out[7 * count + t] = __any_sync(kWarpMask, t == 40) * 2 + __all_sync(kWarpMask, t != 40);
}

// x, y [count] fp32 become sums, products and x y + z of T, each [count], as raw bits.
template <typename T>
__global__ void arithmetic_kernel(const float* x, const float* y, const float* z, T* out,
                                  int64_t count) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count) {
    const T a = T(x[i]), b = T(y[i]), c = T(z[i]);
    out[i] = a + b;
    out[count + i] = a * b;
    out[2 * count + i] = a / b;
    out[3 * count + i] = __hfma(a, b, c);
    out[4 * count + i] = __hmax(a, b);
  }
}

template <typename T>
__global__ void narrow_kernel(const float* x, T* out, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count) {
    out[i] = T(x[i]);
  }
}

template <typename T>
__global__ void widen_kernel(const T* x, float* out, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count) {
    out[i] = static_cast<float>(x[i]);
  }
}

dim3 blocks_for(int64_t count) { return dim3(static_cast<unsigned>((count + 255) / 256)); }

template <typename T>
const char* arithmetic(const float* x, const float* y, const float* z, void* out, int64_t count) {
  return error_of([&] {
    return launch(&arithmetic_kernel<T>, blocks_for(count), 256, 0, nullptr, x, y, z,
                  static_cast<T*>(out), count);
  });
}

template <typename T>
const char* product(const void* a, const void* b, float* d) {
  return error_of([&] {
    return launch(&product_kernel<T>, dim3(1), 32, 1024, nullptr, static_cast<const T*>(a),
                  static_cast<const T*>(b), d);
  });
}

template <typename T>
const char* transposed_group(const float* w, const void* b, float* d) {
  return error_of([&] {
    return launch(&transposed_group_kernel<T>, dim3(1), 64, 1024, nullptr, w,
                  static_cast<const T*>(b), d);
  });
}

template <typename T>
const char* convert(const float* wide, void* narrow, float* back, int64_t count) {
  return error_of([&] {
    T* const values = static_cast<T*>(narrow);
    const dim3 blocks = blocks_for(count);
    const cudaError_t error =
        wide != nullptr ? launch(&narrow_kernel<T>, blocks, 256, 0, nullptr, wide, values, count)
                        : cudaSuccess;
    return error != cudaSuccess
               ? error
               : launch(&widen_kernel<T>, blocks, 256, 0, nullptr, values, back, count);
  });
}

}  // namespace

EXPORTED const char* product_half(const void* a, const void* b, float* d) {
  return product<__half>(a, b, d);
}
EXPORTED const char* product_bfloat16(const void* a, const void* b, float* d) {
  return product<__nv_bfloat16>(a, b, d);
}
EXPORTED const char* transposed_group_half(const float* w, const void* b, float* d) {
  return transposed_group<__half>(w, b, d);
}
EXPORTED const char* transposed_group_bfloat16(const float* w, const void* b, float* d) {
  return transposed_group<__nv_bfloat16>(w, b, d);
}
EXPORTED const char* product_tf32(const float* a, const float* b, float* d, bool rounded) {
  return error_of(
      [&] { return launch(&product_tf32_kernel, dim3(1), 32, 0, nullptr, a, b, d, rounded); });
}
EXPORTED const char* fragments(const uint16_t* matrices, uint32_t* out, bool transposed) {
  return error_of(
      [&] { return launch(&load_kernel, dim3(1), 32, 512, nullptr, matrices, out, transposed); });
}
EXPORTED const char* collectives(int* out, int threads) {
  return error_of([&] { return launch(&collectives_kernel, dim3(1), threads, 0, nullptr, out); });
}
EXPORTED const char* arithmetic_half(const float* x, const float* y, const float* z, void* out,
                                     int64_t count) {
  return arithmetic<__half>(x, y, z, out, count);
}
EXPORTED const char* arithmetic_bfloat16(const float* x, const float* y, const float* z, void* out,
                                         int64_t count) {
  return arithmetic<__nv_bfloat16>(x, y, z, out, count);
}
// wide -> narrow -> back; without wide, narrow is what is given.
EXPORTED const char* convert_half(const float* wide, void* narrow, float* back, int64_t count) {
  return convert<__half>(wide, narrow, back, count);
}
EXPORTED const char* convert_bfloat16(const float* wide, void* narrow, float* back, int64_t count) {
  return convert<__nv_bfloat16>(wide, narrow, back, count);
}

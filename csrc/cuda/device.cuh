// What the kernels use of the device beyond C++: launches, dynamic shared memory, asynchronous
// copies, matrix fragments. Everything else is CUDA's own (__syncthreads, __shfl_xor_sync, ...).
//
// Compiled by nvcc these are instructions; compiled for the host, csrc/emulation states what they
// do. Kernels contain no other inline assembly and no <<<>>>, so both compile the same files.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifndef __CUDACC__
#include "emulation/device.h"
#else

#include "cuda/shared_limits.h"

namespace mimkernels::cuda {

// Lets `kernel` have `bytes` of dynamic shared memory on the current device: more than 48 KiB have to
// be asked for, which is done once per kernel and device.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  static SharedLimits limits;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return limits.raise_to(kernel, device, bytes, [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  });
}

// Starts kernel(args...) on `stream` with `shared_bytes` of dynamic shared memory, and says whether
// it could be started.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  const cudaError_t error =
      allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// The block's dynamic shared memory, on 16 bytes. All shared memory is dynamic.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char mimkernels_shared[];
  return mimkernels_shared;
}

// Starts copying 16 bytes from global to shared memory, past the registers; where `valid` is false
// 16 zero bytes are written and nothing is read. Both addresses lie on 16 bytes.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of copies that this thread has started since the last call.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most PENDING of this thread's groups are under way. Other threads see the data
// after the next barrier.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory into a warp's registers. Lane l gives the
// address of row l % 8 of matrix l / 8 (16 bytes, on 16); r[m] of lane l then holds elements
// 2 * (l % 4) and + 1 of row l / 4 of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The same, each matrix transposed: r[m] of lane l holds elements (2 * (l % 4), l / 4) and
// (2 * (l % 4) + 1, l / 4) of matrix m, as row and column.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// d += a b in fp32, a 16x16 and b 16x8 of T (__half or __nv_bfloat16), d 16x8. With g = lane / 4
// and t = lane % 4, two elements per register, the lower one first:
//   a[0] = A[g][2t..]  a[1] = A[g + 8][2t..]  a[2] = A[g][2t + 8..]  a[3] = A[g + 8][2t + 8..]
//   b[0] = B[2t..][g]  b[1] = B[2t + 8..][g]
//   d[0], d[1] = D[g][2t], D[g][2t + 1]       d[2], d[3] = D[g + 8][2t], D[g + 8][2t + 1]
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d += a b in fp32 from TF32 operands (fp32 bits, of which the low 13 are ignored), a 16x8, b 8x8:
//   a[0] = A[g][t]  a[1] = A[g + 8][t]  a[2] = A[g][t + 4]  a[3] = A[g + 8][t + 4]
//   b0 = B[t][g]    b1 = B[t + 4][g]    d as above
__device__ __forceinline__ void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x rounded to TF32, to nearest, ties away from zero; the low 13 bits are zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

// 2 to the power x, within two units in the last place.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, within one unit in the last place; 0 where that is subnormal.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// The square root of x, with a relative error of at most 2^-23; of subnormal numbers 0.
__device__ __forceinline__ float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mimkernels::cuda

#endif

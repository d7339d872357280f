#include <limits>

#include "cuda/device.cuh"
#include "cuda/gather_tokens.h"
#include "cuda/vector.cuh"

namespace mimkernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
// The batch is cut into at most this many slices, whose partial sums are then added in order.
// Fixed, so that the order of a sum depends on the shape alone.
constexpr int64_t kSlices = 32;

int64_t slices_of(int64_t items) { return items < kSlices ? items : kSlices; }

// Adds to sums[] the words v of the gradient rows that were gathered from token n of image b, in
// the order of m, then k. Every lane of a warp calls it, `active` or not: the lanes search the ids
// together.
template <typename T, int VEC>
__device__ __forceinline__ void add_gathered(float (&sums)[VEC], const GatherTokensBwdParams& p,
                                             int64_t b, int64_t n, int v, bool active) {
  const int lane = threadIdx.x % kWarp;
  const T* const grad = static_cast<const T*>(p.grad.data);
  for (int64_t m = 0; m < p.masks; ++m) {
    const int64_t* const ids = p.ids.data + m * p.ids.stride0 + b * p.ids.stride1;
    const T* const rows = grad + (m * p.batch + b) * p.grad.stride0;
    for (int64_t start = 0; start < p.kept; start += kWarp) {
      const bool match = start + lane < p.kept && __ldg(ids + start + lane) == n;
      unsigned found = __ballot_sync(kAll, match);
      while (found != 0) {
        const int64_t k = start + __ffs(static_cast<int>(found)) - 1;
        found &= found - 1;
        if (active) {
          const T* const row = rows + (p.num_prefix + k) * p.grad.stride1;
          accumulate<T, VEC>(sums, __ldg(reinterpret_cast<const Word<T, VEC>*>(row) + v));
        }
      }
    }
  }
}

// grid:     blocks of 256 threads; a warp owns 32 vectors of one row of dx, then loops
// in:       grad [M * B, P + K, D] by stride, last stride 1; ids int64 [M, B, K] by stride
// out:      dx [B, N, D] contiguous; every element written exactly once, zero where never gathered
// numerics: fp32 sums in the order of m, then k; rounded once
// bounds:   the tail of a row is masked; an id outside [0, N) matches no row; offsets are int64
// cost:     grad read once, dx written once; the ids of an image, M * K, are searched per 32
// vectors of a row
//           by the whole warp, from L1; no atomics, deterministic
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_dx_kernel(GatherTokensBwdParams p, int vectors, int chunks) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int64_t items = p.batch * p.tokens * chunks;
  for (int64_t item = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp; item < items;
       item += warps) {
    int64_t chunk, n;
    const int64_t row = divide(item, chunks, chunk);
    const int64_t b = divide(row, p.tokens, n);
    const int v = static_cast<int>(chunk) * kWarp + lane;
    float sums[VEC] = {};
    add_gathered<T, VEC>(sums, p, b, n, v, v < vectors);
    if (v < vectors) {
      reinterpret_cast<Word<T, VEC>*>(static_cast<T*>(p.dx) + row * p.dim)[v] = pack<T, VEC>(sums);
    }
  }
}

// grid:     blocks of 256 threads; a warp owns 32 vectors of one row of one slice's partial sums,
// then loops in:       as above out:      partial fp32 [slices, N + P, D]: rows 0..N-1 are dpos,
// the rest dprefix, each summed over the
//           images b = slice, slice + slices, ...; rows that nobody asked for are left as they are
// numerics: fp32 sums in the order of b, then m, then k (dprefix: b, then m)
// bounds:   as above
// cost:     grad read once, partial written once; no atomics, deterministic
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_partial_kernel(GatherTokensBwdParams p, float* partial, int64_t slices,
                                 int vectors, int chunks) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const int64_t rows = p.tokens + p.num_prefix;
  const int64_t items = slices * rows * chunks;
  for (int64_t item = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp; item < items;
       item += warps) {
    int64_t chunk, row;
    const int64_t slice = divide(divide(item, chunks, chunk), rows, row);
    if (row < p.tokens ? p.dpos == nullptr : p.dprefix == nullptr) {
      continue;
    }
    const int v = static_cast<int>(chunk) * kWarp + lane;
    float sums[VEC] = {};
    for (int64_t b = slice; b < p.batch; b += slices) {
      if (row < p.tokens) {
        add_gathered<T, VEC>(sums, p, b, row, v, v < vectors);
      } else if (v < vectors) {
        for (int64_t m = 0; m < p.masks; ++m) {
          const T* const source = static_cast<const T*>(p.grad.data) +
                                  (m * p.batch + b) * p.grad.stride0 +
                                  (row - p.tokens) * p.grad.stride1;
          accumulate<T, VEC>(sums, __ldg(reinterpret_cast<const Word<T, VEC>*>(source) + v));
        }
      }
    }
    if (v < vectors) {
      float* const target = partial + (slice * rows + row) * p.dim + int64_t{v} * VEC;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        target[e] = sums[e];
      }
    }
  }
}

// grid:     blocks of 256 threads; a thread owns one element of dpos or dprefix, then loops
// in:       partial fp32 [slices, N + P, D]
// out:      dpos [N, D], dprefix [P, D], each where asked for; every element written exactly once
// numerics: fp32 sums in the order of the slices; rounded once
// bounds:   offsets are int64
// cost:     partial read once; no atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_sum_kernel(GatherTokensBwdParams p, const float* partial, int64_t slices) {
  const int64_t split = p.tokens * p.dim;
  const int64_t elements = split + p.num_prefix * p.dim;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < elements;
       i += gridDim.x * int64_t{kThreads}) {
    T* const target = static_cast<T*>(i < split ? p.dpos : p.dprefix);
    if (target == nullptr) {
      continue;
    }
    float sum = 0.0f;
    for (int64_t slice = 0; slice < slices; ++slice) {
      sum += partial[slice * elements + i];
    }
    target[i < split ? i : i - split] = from_float<T>(sum);
  }
}

template <typename T, int VEC>
cudaError_t start(const GatherTokensBwdParams& p, float* workspace, cudaStream_t stream) {
  const int vectors = static_cast<int>(p.dim / VEC);
  const int chunks = (vectors + kWarp - 1) / kWarp;
  constexpr int kWarps = kThreads / kWarp;
  if (p.dx != nullptr && p.batch * p.tokens > 0) {
    const unsigned blocks = blocks_for(p.batch * p.tokens * chunks, kWarps);
    const cudaError_t error = launch(gather_tokens_dx_kernel<T, VEC>, dim3(blocks), kThreads, 0,
                                     stream, p, vectors, chunks);
    if (error != cudaSuccess) {
      return error;
    }
  }
  const int64_t rows = p.tokens + p.num_prefix;
  if ((p.dpos != nullptr || p.dprefix != nullptr) && rows > 0) {
    const int64_t slices = slices_of(p.batch);
    if (slices > 0) {
      const unsigned blocks = blocks_for(slices * rows * chunks, kWarps);
      const cudaError_t error = launch(gather_tokens_partial_kernel<T, VEC>, dim3(blocks), kThreads,
                                       0, stream, p, workspace, slices, vectors, chunks);
      if (error != cudaSuccess) {
        return error;
      }
    }
    return launch(gather_tokens_sum_kernel<T>, dim3(blocks_for(rows * p.dim, kThreads)), kThreads,
                  0, stream, p, workspace, slices);
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t choose_vectors(const GatherTokensBwdParams& p, float* workspace, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool aligned = p.dim % kVec == 0 &&
                       rows_aligned(p.grad.data, p.grad.stride0, p.grad.stride1, sizeof(T)) &&
                       rows_aligned(p.dx, 0, p.dim, sizeof(T));
  return aligned ? start<T, kVec>(p, workspace, stream) : start<T, 1>(p, workspace, stream);
}

}  // namespace

int64_t gather_tokens_bwd_workspace(const GatherTokensBwdParams& p) {
  const bool sums = p.dpos != nullptr || p.dprefix != nullptr;
  return sums ? slices_of(p.batch) * (p.tokens + p.num_prefix) * p.dim : 0;
}

cudaError_t gather_tokens_bwd(const GatherTokensBwdParams& p, float* workspace,
                              cudaStream_t stream) {
  if (p.dim == 0) {
    return cudaSuccess;
  }
  if (p.dim > std::numeric_limits<int>::max()) {
    return cudaErrorInvalidValue;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return choose_vectors<float>(p, workspace, stream);
    case DType::kBFloat16:
      return choose_vectors<__nv_bfloat16>(p, workspace, stream);
    case DType::kFloat16:
      return choose_vectors<__half>(p, workspace, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mimkernels::cuda

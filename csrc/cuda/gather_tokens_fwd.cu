#include <limits>

#include "cuda/device.cuh"
#include "cuda/gather_tokens.h"
#include "cuda/vector.cuh"

namespace mimkernels::cuda {
namespace {

// grid:     blocks of 256 threads; 2^lanes_log2 threads (at most a warp) own ROWS rows of out, then
// loop in:       x [B, N, D], pos [N, D], prefix [P, D] by stride, last stride 1; ids int64 [M, B,
// K] by stride out:      [M * B, P + K, D] contiguous; every element written exactly once numerics:
// x + pos in fp32, rounded once; without pos and for prefix rows the bytes are copied bounds: rows
// past the end are neither read nor written; ids are trusted; offsets are int64 cost:     each kept
// row read once, each output row written once, pos and prefix from L2; ROWS independent
//           16-byte loads in flight per thread; no shared memory, no atomics, deterministic
template <typename T, int VEC, int ROWS, bool HAS_POS>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_fwd_kernel(GatherTokensFwdParams p, int64_t rows, int vectors, int lanes_log2) {
  using W = Word<T, VEC>;
  const int lanes = 1 << lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t groups = kThreads >> lanes_log2;
  const int64_t group = blockIdx.x * groups + (threadIdx.x >> lanes_log2);
  const int64_t row_length = p.num_prefix + p.kept;
  const T* const x = static_cast<const T*>(p.x.data);
  const T* const pos = static_cast<const T*>(p.pos.data);
  const T* const prefix = static_cast<const T*>(p.prefix.data);

  for (int64_t first = group * ROWS; first < rows; first += gridDim.x * groups * ROWS) {
    const W* source[ROWS];
    const W* addend[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      source[r] = nullptr;
      addend[r] = nullptr;
      if (first + r < rows) {
        int64_t j, b;
        const int64_t m = divide(divide(first + r, row_length, j), p.batch, b);
        if (j < p.num_prefix) {
          source[r] = reinterpret_cast<const W*>(prefix + j * p.prefix.stride1);
        } else {
          const int64_t id =
              __ldg(p.ids.data + m * p.ids.stride0 + b * p.ids.stride1 + j - p.num_prefix);
          source[r] = reinterpret_cast<const W*>(x + b * p.x.stride0 + id * p.x.stride1);
          if constexpr (HAS_POS) {
            addend[r] = reinterpret_cast<const W*>(pos + id * p.pos.stride1);
          }
        }
      }
    }
    W* const out = reinterpret_cast<W*>(static_cast<T*>(p.out) + first * p.dim);
#pragma unroll(ROWS == 1 ? 4 : 1)
    for (int v = lane; v < vectors; v += lanes) {
      W words[ROWS];
      W addends[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        words[r] = source[r] != nullptr ? __ldg(source[r] + v) : W{};
        if constexpr (HAS_POS) {
          addends[r] = addend[r] != nullptr ? __ldg(addend[r] + v) : W{};
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (source[r] == nullptr) {
          continue;
        }
        if (HAS_POS && addend[r] != nullptr) {
          float sums[VEC] = {};
          accumulate<T, VEC>(sums, words[r]);
          accumulate<T, VEC>(sums, addends[r]);
          words[r] = pack<T, VEC>(sums);
        }
        out[static_cast<int64_t>(r) * vectors + v] = words[r];
      }
    }
  }
}

template <typename T, int VEC, int ROWS, bool HAS_POS>
cudaError_t start(const GatherTokensFwdParams& p, int64_t rows, cudaStream_t stream) {
  const int vectors = static_cast<int>(p.dim / VEC);
  const int log2 = lanes_log2(vectors);
  const unsigned blocks = blocks_for(rows, static_cast<int64_t>(kThreads >> log2) * ROWS);
  return launch(gather_tokens_fwd_kernel<T, VEC, ROWS, HAS_POS>, dim3(blocks), kThreads, 0, stream,
                p, rows, vectors, log2);
}

template <typename T, int VEC>
cudaError_t choose_rows(const GatherTokensFwdParams& p, cudaStream_t stream) {
  const int64_t rows = p.masks * p.batch * (p.num_prefix + p.kept);
  // Four rows per warp only where they still fill a large device: about 132 SMs of 16 warps.
  const bool many = rows >= 4 * 16 * 132;
  if (p.pos.data != nullptr) {
    return many ? start<T, VEC, 4, true>(p, rows, stream) : start<T, VEC, 1, true>(p, rows, stream);
  }
  return many ? start<T, VEC, 4, false>(p, rows, stream) : start<T, VEC, 1, false>(p, rows, stream);
}

template <typename T>
cudaError_t choose_vectors(const GatherTokensFwdParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool aligned = p.dim % kVec == 0 && rows_aligned(p.out, 0, p.dim, sizeof(T)) &&
                       rows_aligned(p.x.data, p.x.stride0, p.x.stride1, sizeof(T)) &&
                       rows_aligned(p.pos.data, 0, p.pos.stride1, sizeof(T)) &&
                       rows_aligned(p.prefix.data, 0, p.prefix.stride1, sizeof(T));
  return aligned ? choose_rows<T, kVec>(p, stream) : choose_rows<T, 1>(p, stream);
}

}  // namespace

cudaError_t gather_tokens_fwd(const GatherTokensFwdParams& p, cudaStream_t stream) {
  if (p.masks * p.batch * (p.num_prefix + p.kept) * p.dim == 0) {
    return cudaSuccess;
  }
  if (p.dim > std::numeric_limits<int>::max()) {
    return cudaErrorInvalidValue;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return choose_vectors<float>(p, stream);
    case DType::kBFloat16:
      return choose_vectors<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return choose_vectors<__half>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mimkernels::cuda

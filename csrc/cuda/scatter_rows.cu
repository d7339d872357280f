#include "cuda/scatter_rows.h"

#include "cuda/matches.cuh"
#include "cuda/patches.cuh"
#include "cuda/sums.cuh"

namespace mimkernels::cuda {
namespace {

// A target of one block: where its row of grad starts, of how many rows it is the sum, where it
// goes, and which it is.
struct Target {
  int64_t source;
  int64_t to;
  int64_t n;
  int64_t count;
};

// Target j of image b. Every lane of a warp calls it and gets the same.
__device__ __forceinline__ Target find_target(const ScatterRowsParams& p, const Images& out,
                                              const PatchLayout& layout, int64_t b, int64_t j) {
  Target target;
  target.n = j - p.copied;
  target.to = patch_offset(out, layout, b, j);
  target.count = 1;
  target.source = b * p.grad.stride0;
  if (target.n < 0 || !p.has_ids) {
    target.source += (target.n < 0 ? j : p.num_prefix + j) * p.grad.stride1;
    return target;
  }
  int64_t count = 0;
  int64_t first_m = 0;
  int64_t first_k = 0;
  for_each_match(p.ids, p.masks, p.kept, b, target.n, [&](int64_t m, int64_t k) {
    if (count == 0) {
      first_m = m;
      first_k = k;
    }
    ++count;
  });
  target.count = count;
  target.source += first_m * p.batch * p.grad.stride0 + (p.num_prefix + first_k) * p.grad.stride1;
  return target;
}

// grid:     (targets, images): a block owns 8 targets of an image per group of `columns` threads,
//           which share each target's elements; then loops over both
// in:       grad [M * B, P + K, E] by stride, last stride 1; ids int64 [M, B, K] by stride or none;
//           scale fp32 [C] or null
// out:      images of targets, contiguous; every element written exactly once, zero where no row
//           was gathered
// numerics: fp32 sums in the order of m, then k, where Dst is float compensated; times scale;
//           rounded once
// bounds:   the tail of a row is masked; an id outside [0, N) matches no target; offsets are int64
// cost:     grad read once, out written once, 4 independent loads in flight per thread; the ids of
//           an image, M * K, are searched once per target by one warp, from L1, and again only
//           where several rows meet; no atomics, deterministic
template <typename Src, typename Dst, int VEC>
__global__ void __launch_bounds__(kThreads, 3)
    scatter_rows_kernel(ScatterRowsParams p, Images out, PatchLayout layout, int vectors,
                        RowBlock block) {
  constexpr int kBatch = 4;
  Target* const shared = reinterpret_cast<Target*>(shared_memory());
  const int lane = threadIdx.x % kWarp;
  const int group = threadIdx.x / block.columns;
  const int column = threadIdx.x - group * block.columns;
  const Target* const mine = shared + group * RowBlock::kPerGroup;

  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    for (int64_t first = int64_t{blockIdx.x} * block.rows(); first < layout.patches;
         first += int64_t{gridDim.x} * block.rows()) {
      for (int r = threadIdx.x / kWarp; r < block.rows(); r += block.threads() / kWarp) {
        Target target = {0, 0, 0, -1};
        if (first + r < layout.patches) {
          target = find_target(p, out, layout, b, first + r);
        }
        if (lane == 0) {
          shared[r] = target;
        }
      }
      __syncthreads();
      // Whole warps stay in the loop: they search together.
      for (int start = column - lane; start < vectors; start += block.columns) {
        const int v = start + lane;
        const bool active = v < vectors;
        const Pixel pixel = pixel_at(out, layout, active ? v * VEC : 0);
        const float scale = p.has_scale ? __ldg(p.scale + pixel.channel) : 1.0f;
        const Src* const grad = static_cast<const Src*>(p.grad.data) + int64_t{v} * VEC;
        Dst* const result = static_cast<Dst*>(p.out) + pixel.offset;
#pragma unroll 1
        for (int r0 = 0; r0 < RowBlock::kPerGroup; r0 += kBatch) {
          Pack<Src, VEC> packs[kBatch];
#pragma unroll
          for (int r = 0; r < kBatch; ++r) {
            packs[r] = {};
            if (active && mine[r0 + r].count >= 1) {
              packs[r] = load_pack<Src, VEC>(grad + mine[r0 + r].source);
            }
          }
#pragma unroll
          for (int r = 0; r < kBatch; ++r) {
            const Target& target = mine[r0 + r];
            float values[VEC];
            unpack<Src, VEC>(values, packs[r]);
            if (target.count > 1) {
              int64_t number = 0;
              RowSum<Dst> sums[VEC];
#pragma unroll
              for (int e = 0; e < VEC; ++e) {
                sums[e].add(values[e]);
              }
              for_each_match(p.ids, p.masks, p.kept, b, target.n, [&](int64_t m, int64_t k) {
                if (number++ > 0 && active) {
                  const int64_t row =
                      (m * p.batch + b) * p.grad.stride0 + (p.num_prefix + k) * p.grad.stride1;
                  float more[VEC];
                  unpack<Src, VEC>(more, load_pack<Src, VEC>(grad + row));
#pragma unroll
                  for (int e = 0; e < VEC; ++e) {
                    sums[e].add(more[e]);
                  }
                }
              });
#pragma unroll
              for (int e = 0; e < VEC; ++e) {
                values[e] = sums[e].total();
              }
            }
            if (active && target.count >= 0) {
#pragma unroll
              for (int e = 0; e < VEC; ++e) {
                values[e] *= scale;
              }
              *reinterpret_cast<Word<Dst, VEC>*>(result + target.to) = pack<Dst, VEC>(values);
            }
          }
        }
      }
      __syncthreads();
    }
  }
}

template <typename Src, typename Dst, int VEC>
cudaError_t scatter(const ScatterRowsParams& p, const Images& out, const PatchLayout& layout,
                    cudaStream_t stream) {
  const int vectors = static_cast<int>(layout.elements / VEC);
  const RowBlock block = row_block(vectors);
  const dim3 blocks = blocks_for_grid(ceil_div(layout.patches, block.rows()), p.batch);
  return launch(scatter_rows_kernel<Src, Dst, VEC>, blocks, block.threads(),
                block.rows() * static_cast<int>(sizeof(Target)), stream, p, out, layout, vectors,
                block);
}

}  // namespace

cudaError_t scatter_rows(const ScatterRowsParams& p, cudaStream_t stream) {
  const PatchGrid& grid = p.grid;
  const PatchLayout layout = layout_of(grid);
  if (p.batch * layout.patches * layout.elements == 0) {
    return cudaSuccess;
  }
  if (!fits(layout)) {
    return cudaErrorInvalidValue;
  }
  Images out;
  out.data = p.out;
  out.dtype = p.out_dtype;
  out.stride_row = grid.width;
  out.stride_frame = grid.height * out.stride_row;
  out.stride_channel = grid.frames * out.stride_frame;
  out.stride_batch = grid.channels * out.stride_channel;
  return with_float_type(p.grad_dtype, [&](auto grad) {
    return with_float_type(p.out_dtype, [&](auto result) {
      using Src = decltype(grad);
      using Dst = decltype(result);
      constexpr int kVec = 16 / sizeof(Dst);
      constexpr int kBytes = kVec * sizeof(Src) < 16 ? kVec * sizeof(Src) : 16;
      const bool aligned =
          runs_aligned(out, grid, sizeof(Dst), kVec) &&
          rows_aligned(p.grad.data, p.grad.stride0, p.grad.stride1, sizeof(Src), kBytes);
      return aligned ? scatter<Src, Dst, kVec>(p, out, layout, stream)
                     : scatter<Src, Dst, 1>(p, out, layout, stream);
    });
  });
}

}  // namespace mimkernels::cuda

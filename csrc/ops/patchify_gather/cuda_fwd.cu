#include "ops/patchify_gather/cuda.h"

#include "cuda/patches.cuh"

namespace mimkernels::cuda {
namespace {

// grid:     (patches, samples): a block owns 8 patches of a sample per group of `columns` threads,
//           which share each patch's elements; then loops over both
// in:       images [B, C, T, H, W] by stride, last stride 1; ids int64 [M, B, K] by stride or none;
//           scale and shift fp32 [C] or null
// out:      [M * B, K, E] contiguous; every element written exactly once
// numerics: pixel * scale + shift in fp32, rounded once
// bounds:   the tail of a patch is masked; an id outside [0, N) reads as zeros; offsets are int64
// cost:     each chosen patch read once, each output row written once; 4 independent loads in
//           flight per thread, 16-byte stores; where an element lies in its patch is worked out
//           once per 8 patches; no atomics, deterministic
template <typename Src, typename Dst, int VEC>
__global__ void __launch_bounds__(kThreads, 3)
    patchify_gather_fwd_kernel(PatchifyGatherFwdParams p, PatchLayout layout, int vectors,
                               RowBlock block) {
  constexpr int kBatch = 4;
  int64_t* const starts = reinterpret_cast<int64_t*>(shared_memory());  // of the patches; -1: none
  const int group = threadIdx.x / block.columns;
  const int column = threadIdx.x - group * block.columns;
  const Src* const images = static_cast<const Src*>(p.images.data);

  for (int64_t sample = blockIdx.y; sample < p.masks * p.grid.batch; sample += gridDim.y) {
    int64_t b;
    const int64_t m = divide(sample, p.grid.batch, b);
    for (int64_t first = int64_t{blockIdx.x} * block.rows(); first < p.kept;
         first += int64_t{gridDim.x} * block.rows()) {
      for (int r = threadIdx.x; r < block.rows(); r += block.threads()) {
        const int64_t k = first + r;
        int64_t n = k < p.kept ? k : -1;
        if (n >= 0 && p.ids.given) {
          n = __ldg(p.ids.data + m * p.ids.stride0 + b * p.ids.stride1 + k);
        }
        starts[r] = n >= 0 && n < layout.patches ? patch_offset(p.images, layout, b, n) : -1;
      }
      __syncthreads();
      const int64_t mine = group * RowBlock::kPerGroup;
      for (int v = column; v < vectors; v += block.columns) {
        const Pixel pixel = pixel_at(p.images, layout, v * VEC);
        float scale = 1.0f;
        float shift = -0.0f;  // which changes no bit
        if (p.images.has_scale) {
          scale = __ldg(p.images.scale + pixel.channel);
          shift = __ldg(p.images.shift + pixel.channel);
        }
        Dst* const out = static_cast<Dst*>(p.out) +
                         (sample * p.kept + first + mine) * layout.elements + int64_t{v} * VEC;
#pragma unroll 1
        for (int r0 = 0; r0 < RowBlock::kPerGroup; r0 += kBatch) {
          Pack<Src, VEC> packs[kBatch];
#pragma unroll
          for (int r = 0; r < kBatch; ++r) {
            packs[r] = {};
            const int64_t start = starts[mine + r0 + r];
            if (start >= 0) {
              packs[r] = load_pack<Src, VEC>(images + start + pixel.offset);
            }
          }
#pragma unroll
          for (int r = 0; r < kBatch; ++r) {
            const bool found = starts[mine + r0 + r] >= 0;
            float values[VEC];
            unpack<Src, VEC>(values, packs[r]);
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
              values[e] = found ? values[e] * scale + shift : 0.0f;
            }
            if (first + mine + r0 + r < p.kept) {
              *reinterpret_cast<Word<Dst, VEC>*>(out + (r0 + r) * layout.elements) =
                  pack<Dst, VEC>(values);
            }
          }
        }
      }
      __syncthreads();
    }
  }
}

template <typename Src, typename Dst, int VEC>
cudaError_t patchify(const PatchifyGatherFwdParams& p, const PatchLayout& layout,
                     cudaStream_t stream) {
  const int vectors = static_cast<int>(layout.elements / VEC);
  const RowBlock block = row_block(vectors);
  const dim3 blocks = blocks_for_grid(ceil_div(p.kept, block.rows()), p.masks * p.grid.batch);
  return launch(patchify_gather_fwd_kernel<Src, Dst, VEC>, blocks, block.threads(),
                block.rows() * static_cast<int>(sizeof(int64_t)), stream, p, layout, vectors,
                block);
}

}  // namespace

cudaError_t patchify_gather_fwd(const PatchifyGatherFwdParams& p, cudaStream_t stream) {
  const PatchLayout layout = layout_of(p.grid);
  if (p.masks * p.grid.batch * p.kept * layout.elements == 0) {
    return cudaSuccess;
  }
  if (!fits(layout)) {
    return cudaErrorInvalidValue;
  }
  return with_image_type(p.images.dtype, [&](auto image) {
    return with_float_type(p.out_dtype, [&](auto result) {
      using Src = decltype(image);
      using Dst = decltype(result);
      constexpr int kVec = 16 / sizeof(Dst);
      const bool aligned = runs_aligned(p.images, p.grid, sizeof(Src), kVec) &&
                           rows_aligned(p.out, 0, layout.elements, sizeof(Dst));
      return aligned ? patchify<Src, Dst, kVec>(p, layout, stream)
                     : patchify<Src, Dst, 1>(p, layout, stream);
    });
  });
}

}  // namespace mimkernels::cuda

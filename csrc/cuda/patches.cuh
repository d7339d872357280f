// Patches of images: how a grid lies in memory, and runs of pixels as fp32 numbers.
#pragma once

#include <limits>

#include "core/params.h"
#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace mimkernels::cuda {

// VEC elements of T as they lie in memory, in words of at most 16 bytes.
template <typename T, int VEC>
struct Pack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * VEC;
  static constexpr int kWordBytes = kBytes < 16 ? kBytes : 16;
  typename WordOf<kWordBytes>::type words[kBytes / kWordBytes];
};

template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> load_pack(const T* from) {
  Pack<T, VEC> pack;
  constexpr int kWords = sizeof(pack.words) / sizeof(pack.words[0]);
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    pack.words[w] = __ldg(reinterpret_cast<decltype(&pack.words[0])>(const_cast<T*>(from)) + w);
  }
  return pack;
}

template <typename T, int VEC>
__device__ __forceinline__ void unpack(float (&values)[VEC], const Pack<T, VEC>& pack) {
  T elements[VEC];
  memcpy(elements, pack.words, sizeof(elements));
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    values[e] = to_float(elements[e]);
  }
}

// Sizes that follow from a grid of patches. Those that kernels divide by have 32 bits, which is
// many times cheaper; launchers refuse more.
struct PatchLayout {
  uint32_t grid_h = 0;
  uint32_t grid_w = 0;
  uint32_t patch_t = 0;
  uint32_t patch_h = 0;
  uint32_t patch_w = 0;
  int64_t patches = 0;   // N
  int64_t elements = 0;  // E
};

inline PatchLayout layout_of(const PatchGrid& grid) {
  const int64_t grid_h = grid.height / grid.patch_h;
  const int64_t grid_w = grid.width / grid.patch_w;
  PatchLayout layout;
  layout.grid_h = static_cast<uint32_t>(grid_h);
  layout.grid_w = static_cast<uint32_t>(grid_w);
  layout.patch_t = static_cast<uint32_t>(grid.patch_t);
  layout.patch_h = static_cast<uint32_t>(grid.patch_h);
  layout.patch_w = static_cast<uint32_t>(grid.patch_w);
  layout.patches = grid.frames / grid.patch_t * grid_h * grid_w;
  layout.elements = grid.channels * grid.patch_t * grid.patch_h * grid.patch_w;
  return layout;
}

// Whether every number that kernels divide, or count in an int, fits 31 bits.
inline bool fits(const PatchLayout& layout) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  return layout.patches <= kMost && layout.elements <= kMost;
}

// Where patch n < N of image b starts, in elements.
__device__ __forceinline__ int64_t patch_offset(const Images& images, const PatchLayout& layout,
                                                int64_t b, int64_t n) {
  const uint32_t line = static_cast<uint32_t>(n) / layout.grid_w;
  const uint32_t column = static_cast<uint32_t>(n) - line * layout.grid_w;
  const uint32_t frame = line / layout.grid_h;
  const uint32_t row = line - frame * layout.grid_h;
  return b * images.stride_batch + int64_t{frame} * layout.patch_t * images.stride_frame +
         int64_t{row} * layout.patch_h * images.stride_row + int64_t{column} * layout.patch_w;
}

// Element e < E of a patch, in the order (c, t, h, w): its channel, and how far it is from the
// patch's start.
struct Pixel {
  int64_t offset;
  int channel;
};

__device__ __forceinline__ Pixel pixel_at(const Images& images, const PatchLayout& layout, int e) {
  const uint32_t line = static_cast<uint32_t>(e) / layout.patch_w;
  const uint32_t w = static_cast<uint32_t>(e) - line * layout.patch_w;
  const uint32_t plane = line / layout.patch_h;
  const uint32_t h = line - plane * layout.patch_h;
  const uint32_t channel = plane / layout.patch_t;
  const uint32_t t = plane - channel * layout.patch_t;
  return {channel * images.stride_channel + t * images.stride_frame + h * images.stride_row + w,
          static_cast<int>(channel)};
}

// Whether runs of `vec` pixels, taken from the rows of patches, all start on their own size or on 16
// bytes, whichever is less.
inline bool runs_aligned(const Images& images, const PatchGrid& grid, int64_t size, int64_t vec) {
  const int64_t bytes = size * vec < 16 ? size * vec : 16;
  return grid.patch_w % vec == 0 &&
         rows_aligned(images.data, images.stride_row, images.stride_frame, size, bytes) &&
         rows_aligned(images.data, images.stride_channel, images.stride_batch, size, bytes);
}

// Calls body(T{}) with the element type of an image.
template <typename Body>
cudaError_t with_image_type(DType dtype, const Body& body) {
  return dtype == DType::kUInt8 ? body(uint8_t{}) : with_float_type(dtype, body);
}

// How a block is laid over rows of `vectors` vectors: `columns` threads share a row, a multiple of
// a warp; `groups` rows are worked on at once, kPerGroup by each group.
struct RowBlock {
  static constexpr int kPerGroup = 8;
  int columns = 0;
  int groups = 0;

  __host__ __device__ int threads() const { return columns * groups; }
  __host__ __device__ int rows() const { return kPerGroup * groups; }
};

inline RowBlock row_block(int64_t vectors) {
  RowBlock block;
  block.columns =
      vectors < kThreads ? static_cast<int>(ceil_div(vectors, kWarp)) * kWarp : kThreads;
  block.groups = block.columns < kThreads / 2 ? kThreads / 2 / block.columns : 1;
  return block;
}

}  // namespace mimkernels::cuda

// Patches of images: reading one as a row of pixels, in fp32 arithmetic.
#pragma once

#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Sizes that follow from a grid of patches.
struct PatchLayout {
  int64_t grid_t = 0;
  int64_t grid_h = 0;
  int64_t grid_w = 0;
  int64_t patches = 0;
  int64_t elements = 0;
};

MIMKERNELS_INLINE PatchLayout layout_of(const PatchGrid& grid) {
  PatchLayout layout;
  layout.grid_t = grid.frames / grid.patch_t;
  layout.grid_h = grid.height / grid.patch_h;
  layout.grid_w = grid.width / grid.patch_w;
  layout.patches = layout.grid_t * layout.grid_h * layout.grid_w;
  layout.elements = grid.channels * grid.patch_t * grid.patch_h * grid.patch_w;
  return layout;
}

// The first pixel of patch n of image b, after the images' first.
MIMKERNELS_INLINE int64_t patch_place(const Images& images, const PatchGrid& grid,
                                      const PatchLayout& layout, int64_t b, int64_t n) {
  const int64_t column = n % layout.grid_w;
  const int64_t row = n / layout.grid_w % layout.grid_h;
  const int64_t frame = n / layout.grid_w / layout.grid_h;
  return b * images.stride_batch + frame * grid.patch_t * images.stride_frame +
         row * grid.patch_h * images.stride_row + column * grid.patch_w;
}

// What a pixel is multiplied with and what is added. Without constants 1 and -0, which change no
// bit: cheaper than a second copy of every loop.
struct PixelMap {
  float scale = 1.0f;
  float shift = -0.0f;
};

MIMKERNELS_INLINE PixelMap pixel_map(const Images& images, int64_t c) {
  PixelMap map;
  if (images.has_scale) {
    map.scale = images.scale[c];
    map.shift = images.shift[c];
  }
  return map;
}

template <bool kStream, int N, typename Dst, typename Src>
MIMKERNELS_INLINE void convert_lanes(Dst* dst, const Src* src, PixelMap map) {
  put<kStream>(dst, load<N>(src) * broadcast<N>(map.scale) + broadcast<N>(map.shift));
}

// The rest of a run: the last step overlaps the one before instead of going pixel by pixel.
template <typename Dst, typename Src>
__attribute__((noinline)) void convert_ragged(Dst* dst, const Src* src, int64_t n, PixelMap map) {
  if (n >= 16) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) convert_lanes<false, 16>(dst + i, src + i, map);
    if (i < n) convert_lanes<false, 16>(dst + n - 16, src + n - 16, map);
  } else if (n >= 8) {
    convert_lanes<false, 8>(dst, src, map);
    convert_lanes<false, 8>(dst + n - 8, src + n - 8, map);
  } else if (n >= 4) {
    convert_lanes<false, 4>(dst, src, map);
    convert_lanes<false, 4>(dst + n - 4, src + n - 4, map);
  } else {
    alignas(16) Src in[4];
    alignas(16) Dst out[4];
    memset(in, 0, sizeof(in));
    for (int64_t i = 0; i < n; ++i) in[i] = src[i];
    convert_lanes<false, 4>(out, in, map);
    for (int64_t i = 0; i < n; ++i) dst[i] = out[i];
  }
}

// dst[i] = src[i] * scale + shift for n pixels. kStream needs n % 16 == 0 and an aligned dst.
template <bool kStream, typename Dst, typename Src>
MIMKERNELS_INLINE void convert_pixels(Dst* dst, const Src* src, int64_t n, PixelMap map) {
  if (kStream || n % 16 == 0) {
    for (int64_t i = 0; i < n; i += 16) convert_lanes<kStream, 16>(dst + i, src + i, map);
  } else {
    convert_ragged(dst, src, n, map);
  }
}

// Asks for n pixels that will be read soon; no hardware prefetcher follows runs of 16 pixels.
template <typename Src>
MIMKERNELS_INLINE void prefetch_pixels(const Src* run, int64_t n) {
  const char* byte = reinterpret_cast<const char*>(run);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(Src)); i += 64) prefetch(byte + i);
}

// The pixels of one patch in the order (c, t, h, w); before_run(at) is called before each run of
// patch_w pixels, `at` its place after the patch's first pixel.
template <bool kStream, typename Dst, typename Src, typename BeforeRun>
MIMKERNELS_INLINE void read_patch(Dst* dst, const Src* patch, const Images& images,
                                  const PatchGrid& grid, const BeforeRun& before_run) {
  const auto read = [&](auto width) MIMKERNELS_LAMBDA_INLINE {
    for (int64_t c = 0; c < grid.channels; ++c) {
      const PixelMap map = pixel_map(images, c);
      for (int64_t t = 0; t < grid.patch_t; ++t) {
        int64_t at = c * images.stride_channel + t * images.stride_frame;
        for (int64_t h = 0; h < grid.patch_h; ++h) {
          before_run(at);
          convert_pixels<kStream>(dst, patch + at, width, map);
          dst += width;
          at += images.stride_row;
        }
      }
    }
  };
  // The usual width as a constant: a run is a few instructions.
  if (grid.patch_w == 16) {
    read(std::integral_constant<int64_t, 16>{});
  } else {
    read(grid.patch_w);
  }
}

// Calls body(T{}) with the element type of an image.
template <typename Body>
MIMKERNELS_INLINE Status with_image_type(DType dtype, const Body& body) {
  if (dtype == DType::kUInt8) return body(uint8_t{});
  return with_float_type(dtype, body);
}

}  // namespace mimkernels::MIMKERNELS_ISA

// What differs from pixel to pixel of a patch: targets normalised by a box around each pixel, and
// which pixels count where the mask is finer than the patches.
#pragma once

#include "ops/masked_patch_loss/cuda.cuh"

namespace mimkernels::cuda {

// Whether that takes kernels of its own.
inline bool by_pixels(const MaskedPatchLossParams& p) { return p.local_norm > 0 || p.cells_h > 0; }

// Whether the launchers can take it: boxes need a tile of the whole patch.
inline bool fits_pixels(const MaskedPatchLossParams& p, const LossBlock& block) {
  return p.local_norm == 0 || block.tile > 0 || block.elements == 0;
}

// A patch of a mask [B, gh * cells_h, gw * cells_w], or of any other mask or ids: one cell.
struct PatchCells {
  const uint8_t* cells = nullptr;  // null: all pixels count
  int count = 0;                   // that are true
};

__device__ __forceinline__ PatchCells patch_cells(const MaskedPatchLossParams& p,
                                                  const LossBlock& block, int64_t b, int64_t n) {
  if (p.cells_h == 0) {
    return {nullptr, 1};
  }
  const uint32_t row = static_cast<uint32_t>(n) / block.layout.grid_w;
  const uint32_t column = static_cast<uint32_t>(n) - row * block.layout.grid_w;
  const uint8_t* const cells =
      p.mask.data + b * p.mask.stride0 + row * p.cells_h * p.mask_stride_row + column * p.cells_w;
  const int width = static_cast<int>(p.cells_w);
  int count = 0;
  for (int i = threadIdx.x % kWarp; i < p.cells_h * p.cells_w; i += kWarp) {
    count += __ldg(cells + i / width * p.mask_stride_row + i % width) != 0;
  }
  return {cells, warp_sum(count)};
}

// Whether element e of the target counts.
__device__ __forceinline__ bool element_counts(const MaskedPatchLossParams& p,
                                               const LossBlock& block, const PatchCells& patch,
                                               int e) {
  if (patch.cells == nullptr) {
    return true;
  }
  const PatchLayout& layout = block.layout;
  const uint32_t pixel = block.step == 1
                             ? static_cast<uint32_t>(e)
                             : static_cast<uint32_t>(e) / static_cast<uint32_t>(block.step);
  const uint32_t line = pixel / layout.patch_w;
  const uint32_t x = pixel - line * layout.patch_w;
  const uint32_t y = line % layout.patch_h;
  const uint32_t row = y / (layout.patch_h / static_cast<uint32_t>(p.cells_h));
  const uint32_t column = x / (layout.patch_w / static_cast<uint32_t>(p.cells_w));
  return __ldg(patch.cells + row * p.mask_stride_row + column) != 0;
}

// Elements that count, of a mask with cells; a mean divides by the number of cells later.
__device__ __forceinline__ float counted_elements(const MaskedPatchLossParams& p,
                                                  const LossBlock& block, const PatchCells& patch) {
  if (patch.cells == nullptr) {
    return static_cast<float>(block.elements);
  }
  const int cells = static_cast<int>(p.cells_h * p.cells_w);
  return static_cast<float>(block.elements / cells * (p.mean ? 1 : patch.count));
}

// A plane of an image: one channel of one frame.
struct Plane {
  const void* pixels = nullptr;
  int64_t stride_row = 0;
  int height = 0;
  int width = 0;
  int channel = 0;
};

template <typename Src>
__device__ __forceinline__ float plane_pixel(const Images& images, const Plane& plane, int y,
                                             int x) {
  return normalised(images, plane.channel, load_pixel<Src>(plane.pixels, y * plane.stride_row + x));
}

// Calls store(y, x, target) for pixels [top, top + kBoxRows) x [left, left + kBoxColumns) of a plane
// that lie in [.., bottom) x [.., right), by a whole warp: each minus the mean over the deviation of
// its box. `columns` is shared memory of this warp. Sums are in double, of columns first, and
// nothing is subtracted from them: squares cancel, and what is not finite is felt in its boxes
// alone.
template <typename Src, typename Store>
__device__ __forceinline__ void normalise_by_boxes(const Images& images, const Plane& plane,
                                                   double* columns, int reach, int top, int left,
                                                   int bottom, int right, const Store& store) {
  constexpr int kRows = kBoxRows * kBoxColumns / kWarp;  // of a lane
  const int lane = threadIdx.x % kWarp;
  const int x = left + lane % kBoxColumns;
  const int y = top + lane / kBoxColumns * kRows;
  double sums[kRows] = {};
  double squares[kRows] = {};
  const int end_column = min(left + kBoxColumns + reach, plane.width);
  const int end_row = min(top + kBoxRows + reach, plane.height);
  for (int first = max(left - reach, 0); first < end_column; first += kWarp) {
    double down[kBoxRows] = {};
    double down_squares[kBoxRows] = {};
    if (first + lane < plane.width) {
      for (int row = max(top - reach, 0); row < end_row; ++row) {
        const double pixel =
            static_cast<double>(plane_pixel<Src>(images, plane, row, first + lane));
#pragma unroll
        for (int i = 0; i < kBoxRows; ++i) {
          if (abs(row - (top + i)) <= reach) {
            down[i] += pixel;
            down_squares[i] += pixel * pixel;
          }
        }
      }
    }
    __syncwarp();  // the columns before these have been read
#pragma unroll
    for (int i = 0; i < kBoxRows; ++i) {
      columns[i * kWarp + lane] = down[i];
      columns[(kBoxRows + i) * kWarp + lane] = down_squares[i];
    }
    __syncwarp();
    const double* const mine = columns + lane / kBoxColumns * kRows * kWarp;
    const int end = min(x + reach, first + kWarp - 1) - first;
    for (int column = max(x - reach, first) - first; column <= end; ++column) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        sums[i] += mine[i * kWarp + column];
        squares[i] += mine[(kBoxRows + i) * kWarp + column];
      }
    }
  }
  if (x >= right) {
    return;
  }
  const int across = min(x + reach, plane.width - 1) - max(x - reach, 0) + 1;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (y + i >= bottom) {
      break;
    }
    const int rows = min(y + i + reach, plane.height - 1) - max(y + i - reach, 0) + 1;
    const double count = static_cast<double>(int64_t{rows} * across);
    const double mean = sums[i] / count;
    const double rest = squares[i] - sums[i] * mean;
    // NaN stays NaN; a box of one pixel has variance 0.
    const double variance = (rest < 0.0 ? 0.0 : rest) / (count > 1.0 ? count - 1.0 : 1.0);
    const double pixel = static_cast<double>(plane_pixel<Src>(images, plane, y + i, x));
    store(y + i, x, static_cast<float>((pixel - mean) / sqrt(variance + 1e-6)));
  }
}

// Patch n of image b to the tile, in the order of the predictions.
template <typename Src>
__device__ __forceinline__ void fill_local_tile(float* tile, double* columns,
                                                const MaskedPatchLossParams& p,
                                                const LossBlock& block, int64_t b, int64_t n) {
  const PatchLayout& layout = block.layout;
  const uint32_t line = static_cast<uint32_t>(n) / layout.grid_w;
  const uint32_t column = static_cast<uint32_t>(n) - line * layout.grid_w;
  const uint32_t frame = line / layout.grid_h;
  const int top = static_cast<int>((line - frame * layout.grid_h) * layout.patch_h);
  const int left = static_cast<int>(column * layout.patch_w);
  const int bottom = top + static_cast<int>(layout.patch_h);
  const int right = left + static_cast<int>(layout.patch_w);
  Plane plane;
  plane.stride_row = p.images.stride_row;
  plane.height = static_cast<int>(layout.grid_h * layout.patch_h);
  plane.width = static_cast<int>(layout.grid_w * layout.patch_w);
  const int most = max(plane.height, plane.width);
  const int reach = p.local_norm / 2 < most ? static_cast<int>(p.local_norm / 2) : most;
  const int frames = static_cast<int>(layout.patch_t);
  for (int c = 0; c < p.grid.channels; ++c) {
    plane.channel = c;
    for (int t = 0; t < frames; ++t) {
      plane.pixels = static_cast<const Src*>(p.images.data) + b * p.images.stride_batch +
                     c * p.images.stride_channel +
                     (int64_t{frame} * frames + t) * p.images.stride_frame;
      // Channels last, neighbours are `step` apart; else planes follow each other.
      const int first = block.step == 1 ? c * frames + t : t;
      for (int y0 = top; y0 < bottom; y0 += kBoxRows) {
        for (int x0 = left; x0 < right; x0 += kBoxColumns) {
          normalise_by_boxes<Src>(
              p.images, plane, columns, reach, y0, x0, bottom, right,
              [&](int y, int x, float value) {
                const int pixel = (first * (bottom - top) + y - top) * (right - left) + x - left;
                tile[pixel * block.step + (block.step == 1 ? 0 : c)] = value;
              });
        }
      }
    }
  }
}

// read_target where by_pixels(p).
__device__ __forceinline__ PatchTarget read_pixel_target(const MaskedPatchLossParams& p,
                                                         const LossBlock& block,
                                                         const PixelRun* runs, float* tiles,
                                                         int64_t b, int64_t n) {
  const int warp = threadIdx.x / kWarp;
  float* const tile = tiles + int64_t{warp} * block.tile;
  const bool local = p.local_norm > 0;
  if (local) {
    double* const columns =
        reinterpret_cast<double*>(tiles + int64_t{block.warps} * block.tile) + warp * block.columns;
    __syncwarp();  // the patch before this one has been read
    switch (p.images.dtype) {
      case DType::kFloat32:
        fill_local_tile<float>(tile, columns, p, block, b, n);
        break;
      case DType::kBFloat16:
        fill_local_tile<__nv_bfloat16>(tile, columns, p, block, b, n);
        break;
      case DType::kFloat16:
        fill_local_tile<__half>(tile, columns, p, block, b, n);
        break;
      case DType::kUInt8:
        fill_local_tile<uint8_t>(tile, columns, p, block, b, n);
        break;
    }
    __syncwarp();
  }
  return read_target(p, block, runs, tile, b, n, local);
}

// counted_patch and its cells: n is -1 where none of them counts.
struct CountedPatch {
  int64_t n = -1;
  PatchCells cells;
};

__device__ __forceinline__ CountedPatch counted_pixels(const MaskedPatchLossParams& p,
                                                       const LossBlock& block, int64_t b,
                                                       int64_t j) {
  if (p.cells_h == 0) {
    return {counted_patch(p, block, b, j), {nullptr, 1}};
  }
  const PatchCells cells = patch_cells(p, block, b, j);
  return {cells.count > 0 ? j : -1, cells};
}

}  // namespace mimkernels::cuda

// What the forward and the backward of the masked patch loss share: the target of one patch, which
// a warp builds in shared memory, in the order of the predictions.
#pragma once

#include "cuda/device.cuh"
#include "cuda/patches.cuh"
#include "cuda/rows.cuh"
#include "ops/masked_patch_loss/cuda.h"

namespace mimkernels::cuda {

// Loads that one thread has in flight.
constexpr int kLossBatch = 4;
// Pixels that one thread reads at a time: 16 bytes in fp32, a whole 128-byte line per warp in
// uint8.
constexpr int kQuad = 4;
// Shared memory of a block: so little that several blocks share a multiprocessor, unless one patch
// needs more. Patches that do not fit at all, from 5000 to 12000 elements on, are read from the
// images each time.
constexpr int64_t kSharedWanted = 48 * 1024;
constexpr int64_t kSharedMost = 96 * 1024;
// For the sums of the warps, when the tiles are done with.
constexpr int kSharedLeast = 2 * kThreads / kWarp * static_cast<int>(sizeof(double));

// Pixels that a warp normalises by their boxes at a time, rows and columns, and the columns whose
// sums it keeps beside them: one a lane.
constexpr int kBoxRows = 2;
constexpr int kBoxColumns = 16;
constexpr int kColumnSums = 2 * kBoxRows * kWarp;

// A run of pixels of a patch: where it lies from the patch's start, its place in the target.
struct PixelRun {
  int64_t offset;
  int place;
  int channel;
};

// How a block works: warps that own one patch at a time, a table of runs for all, a tile for each.
struct LossBlock {
  PatchLayout layout;
  int elements = 0;
  int run = 1;   // pixels of a run, kQuad or 1
  int runs = 0;  // in the table; 0: none
  int tile = 0;  // floats of a tile; 0: no tiles
  int warps = 1;
  int step = 1;     // between neighbouring pixels in the target
  int columns = 0;  // doubles of a warp for sums of columns, behind the tiles
  int64_t patches = 0;

  int threads() const { return warps * kWarp; }
  int warp_bytes() const {
    return tile * static_cast<int>(sizeof(float)) + columns * static_cast<int>(sizeof(double));
  }
  int shared_bytes() const {
    const int used = runs * static_cast<int>(sizeof(PixelRun)) + warps * warp_bytes();
    return used < kSharedLeast ? kSharedLeast : used;
  }
};

inline LossBlock loss_block(const MaskedPatchLossParams& p) {
  LossBlock block;
  block.layout = layout_of(p.grid);
  block.elements = static_cast<int>(block.layout.elements);
  block.patches = p.grid.batch * p.length;
  block.step = p.channels_last ? static_cast<int>(p.grid.channels) : 1;
  block.run = runs_aligned(p.images, p.grid, element_size(p.images.dtype), kQuad) ? kQuad : 1;
  constexpr int kWarps = kThreads / kWarp;
  block.warps = kWarps;
  const bool local = p.local_norm > 0;  // its pixels are not read run by run
  const int64_t table = local ? 0 : ceil_div(block.elements, block.run) * int64_t{sizeof(PixelRun)};
  const int64_t tile = ceil_div(block.elements, kQuad) * kQuad;
  const int64_t warp_bytes =
      tile * int64_t{sizeof(float)} + (local ? kColumnSums * int64_t{sizeof(double)} : 0);
  if (table + warp_bytes <= kSharedMost) {
    block.runs = local ? 0 : block.elements / block.run;
    block.tile = static_cast<int>(tile);
    block.columns = local ? kColumnSums : 0;
    const int64_t warps = (kSharedWanted - table) / (warp_bytes > 0 ? warp_bytes : 1);
    block.warps = static_cast<int>(warps < 1 ? 1 : warps < kWarps ? warps : kWarps);
  }
  return block;
}

// Element e of the target as element of the patch in memory order (c, t, h, w).
__device__ __forceinline__ int in_memory_order(int e, int elements, int step) {
  if (step == 1) {
    return e;
  }
  const uint32_t pixel = static_cast<uint32_t>(e) / static_cast<uint32_t>(step);
  return (e - static_cast<int>(pixel) * step) * (elements / step) + static_cast<int>(pixel);
}

// Fills the table of runs; all threads of the block, which then meet at a barrier.
__device__ __forceinline__ void make_runs(PixelRun* runs, const Images& images,
                                          const LossBlock& block) {
  for (int i = threadIdx.x; i < block.runs; i += blockDim.x) {
    const int e = i * block.run;
    const Pixel pixel = pixel_at(images, block.layout, e);
    const int plane = block.elements / block.step;
    // Channels first, elements are in memory order already.
    const int place =
        block.step == 1 ? e : (e - pixel.channel * plane) * block.step + pixel.channel;
    runs[i] = {pixel.offset, place, pixel.channel};
  }
}

__device__ __forceinline__ float normalised(const Images& images, int channel, float value) {
  return !images.has_scale ? value
                           : value * __ldg(images.scale + channel) + __ldg(images.shift + channel);
}

// Terms that a lane adds in a row: larger sums are sums of such sums, or they would lose digits.
constexpr int kLossChain = 16;

// This lane's share of the sum of term(e) over a patch.
template <typename Term>
__device__ __forceinline__ float lane_sum(int elements, const Term& term) {
  float sum = 0.0f;
  for (int first = threadIdx.x % kWarp; first < elements; first += kWarp * kLossChain) {
    const int end = min(elements, first + kWarp * kLossChain);
    float part = 0.0f;
#pragma unroll 4
    for (int e = first; e < end; e += kWarp) {
      part += term(e);
    }
    sum += part;
  }
  return sum;
}

// Pixels of a patch to the tile; returns this lane's share of their sum.
template <typename Src, int RUN>
__device__ __forceinline__ float fill_tile(float* tile, const PixelRun* runs, const Images& images,
                                           int64_t start, const LossBlock& block) {
  const int lane = threadIdx.x % kWarp;
  const Src* const patch = static_cast<const Src*>(images.data) + start;
  float sum = 0.0f;
  for (int first = lane; first < block.runs; first += kWarp * kLossBatch) {
    Pack<Src, RUN> packs[kLossBatch];
#pragma unroll
    for (int i = 0; i < kLossBatch; ++i) {
      packs[i] = {};
      if (first + i * kWarp < block.runs) {
        packs[i] = load_pack<Src, RUN>(patch + runs[first + i * kWarp].offset);
      }
    }
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kLossBatch; ++i) {
      if (first + i * kWarp >= block.runs) {
        continue;
      }
      const PixelRun run = runs[first + i * kWarp];
      float values[RUN];
      unpack<Src, RUN>(values, packs[i]);
#pragma unroll
      for (int e = 0; e < RUN; ++e) {
        values[e] = normalised(images, run.channel, values[e]);
        part += values[e];
      }
      if constexpr (RUN == 1) {
        tile[run.place] = values[0];
      } else if (block.step == 1) {
        *reinterpret_cast<float4*>(tile + run.place) =
            make_float4(values[0], values[1], values[2], values[3]);
      } else {
        // Lanes 8 apart would meet in one bank, were they to write the same pixel of their runs.
        const int turn = lane / 8;
        if (turn & 1) {
          const float head = values[0];
          values[0] = values[1];
          values[1] = values[2];
          values[2] = values[3];
          values[3] = head;
        }
        if (turn & 2) {
          const float low[2] = {values[0], values[1]};
          values[0] = values[2];
          values[1] = values[3];
          values[2] = low[0];
          values[3] = low[1];
        }
#pragma unroll
        for (int e = 0; e < RUN; ++e) {
          tile[run.place + ((e + turn) & 3) * block.step] = values[e];
        }
      }
    }
    sum += part;
  }
  return sum;
}

template <typename Src>
__device__ __forceinline__ float fill_tile(float* tile, const PixelRun* runs, const Images& images,
                                           int64_t start, const LossBlock& block) {
  return block.run == kQuad ? fill_tile<Src, kQuad>(tile, runs, images, start, block)
                            : fill_tile<Src, 1>(tile, runs, images, start, block);
}

template <typename Src>
__device__ __forceinline__ float load_pixel(const void* pixels, int64_t i) {
  float value[1];
  unpack<Src, 1>(value, load_pack<Src, 1>(static_cast<const Src*>(pixels) + i));
  return value[0];
}

// The target of one patch: element e is (pixel(e) - mean) * inverse.
struct PatchTarget {
  const Images& images;
  const LossBlock& block;
  const float* tile;  // or null: read from the images
  int64_t start;
  float mean = 0.0f;
  float inverse = 1.0f;

  __device__ __forceinline__ float pixel(int e) const {
    if (tile != nullptr) {
      return tile[e];
    }
    const int at = in_memory_order(e, block.elements, block.step);
    const Pixel pixel = pixel_at(images, block.layout, at);
    const int64_t i = start + pixel.offset;
    float value = 0.0f;
    switch (images.dtype) {
      case DType::kFloat32:
        value = load_pixel<float>(images.data, i);
        break;
      case DType::kBFloat16:
        value = load_pixel<__nv_bfloat16>(images.data, i);
        break;
      case DType::kFloat16:
        value = load_pixel<__half>(images.data, i);
        break;
      case DType::kUInt8:
        value = load_pixel<uint8_t>(images.data, i);
        break;
    }
    return normalised(images, pixel.channel, value);
  }

  // values[i] = element e + i. VEC of 4 or 8 needs a tile, and e is a multiple of it.
  template <int VEC>
  __device__ __forceinline__ void read(float (&values)[VEC], int e) const {
    if constexpr (VEC >= 4) {
#pragma unroll
      for (int i = 0; i < VEC; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(tile + e + i);
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
      }
    } else {
      values[0] = pixel(e);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      values[i] = (values[i] - mean) * inverse;
    }
  }
};

// The target of patch n of image b, by a whole warp. `filled`: the tile holds it already.
__device__ __forceinline__ PatchTarget read_target(const MaskedPatchLossParams& p,
                                                   const LossBlock& block, const PixelRun* runs,
                                                   float* tile, int64_t b, int64_t n,
                                                   bool filled = false) {
  const int64_t start = patch_offset(p.images, block.layout, b, n);
  PatchTarget target = {p.images, block, filled || block.runs > 0 ? tile : nullptr, start};
  float sum = 0.0f;
  if (target.tile != nullptr && !filled) {
    __syncwarp();  // the patch before this one has been read
    switch (p.images.dtype) {
      case DType::kFloat32:
        sum = fill_tile<float>(tile, runs, p.images, start, block);
        break;
      case DType::kBFloat16:
        sum = fill_tile<__nv_bfloat16>(tile, runs, p.images, start, block);
        break;
      case DType::kFloat16:
        sum = fill_tile<__half>(tile, runs, p.images, start, block);
        break;
      case DType::kUInt8:
        sum = fill_tile<uint8_t>(tile, runs, p.images, start, block);
        break;
    }
    __syncwarp();
  }
  if (p.norm_pix) {
    if (target.tile == nullptr) {
      sum = lane_sum(block.elements, [&](int e) { return target.pixel(e); });
    }
    target.mean = warp_sum(sum) / static_cast<float>(block.elements);
    const float squares = lane_sum(block.elements, [&](int e) {
      const float deviation = target.pixel(e) - target.mean;
      return deviation * deviation;
    });
    // A single pixel has no unbiased variance: 0 / 0.
    const float variance = warp_sum(squares) / static_cast<float>(block.elements - 1);
    target.inverse = 1.0f / sqrtf(variance + 1e-6f);
  }
  return target;
}

// Calls body(v, d) with d[e] = pred - target of element v * VEC + e, for this lane's share, and
// returns the sum of what it returns.
template <typename T, int VEC, typename Body>
__device__ __forceinline__ float sum_over_differences(const T* pred, const PatchTarget& target,
                                                      int elements, const Body& body) {
  float sum = 0.0f;
  const int vectors = elements / VEC;
  for (int first = threadIdx.x % kWarp; first < vectors; first += kWarp * kLossBatch) {
    Pack<T, VEC> packs[kLossBatch];
#pragma unroll
    for (int i = 0; i < kLossBatch; ++i) {
      packs[i] = {};
      if (first + i * kWarp < vectors) {
        packs[i] = load_pack<T, VEC>(pred + (first + i * kWarp) * VEC);
      }
    }
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kLossBatch; ++i) {
      const int v = first + i * kWarp;
      if (v < vectors) {
        float d[VEC];
        float targets[VEC];
        unpack<T, VEC>(d, packs[i]);
        target.read(targets, v * VEC);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          d[e] -= targets[e];
        }
        part += body(v, d);
      }
    }
    sum += part;
  }
  return sum;
}

// Which patch row j of pred is, or -1 if it has no loss: not masked, or an id outside [0, N).
__device__ __forceinline__ int64_t counted_patch(const MaskedPatchLossParams& p,
                                                 const LossBlock& block, int64_t b, int64_t j) {
  if (p.mask.given) {
    return __ldg(p.mask.data + b * p.mask.stride0 + j) != 0 ? j : -1;
  }
  const int64_t n = __ldg(p.ids.data + b * p.ids.stride1 + j);
  return n >= 0 && n < block.layout.patches ? n : -1;
}

// Whether pred and, if given, dpred are accessed 16 bytes at a time.
inline bool pred_aligned(const MaskedPatchLossParams& p, const LossBlock& block) {
  return block.tile > 0 && rows_aligned(p.pred, block.elements, p.dtype) &&
         rows_aligned({p.dpred, 0, 0}, block.elements, p.dtype);
}

}  // namespace mimkernels::cuda

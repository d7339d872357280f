// What the forward and the backward of upsample_cross_entropy share: the four logits around a label
// pixel.
#pragma once

#include "cuda/device.cuh"
#include "cuda/vector.cuh"
#include "ops/upsample_cross_entropy/params.h"
#include "ops/upsample_cross_entropy/places.h"

namespace mimkernels::cuda {

// Offsets of the four logits in a plane, row by row.
struct Taps {
  int64_t at[4];
};

__device__ __forceinline__ Taps taps_of(const UpsampleCrossEntropyParams& p, int64_t row,
                                        int64_t column) {
  const int64_t first = row * p.logits_strides[2];
  const int64_t second = min(row + 1, p.source_h - 1) * p.logits_strides[2];
  const int64_t next = min(column + 1, p.source_w - 1);
  return {{first + column, first + next, second + column, second + next}};
}

// (1 - weight) * first + weight * second: as F.interpolate has it, infinity and NaN included.
__device__ __forceinline__ float between(float first, float second, float weight) {
  return (1.0f - weight) * first + weight * second;
}

template <typename T>
__device__ __forceinline__ float mixed_logit(const T* plane, const Taps& taps, float down,
                                             float along) {
  const float top = between(to_float(plane[taps.at[0]]), to_float(plane[taps.at[1]]), along);
  const float bottom = between(to_float(plane[taps.at[2]]), to_float(plane[taps.at[3]]), along);
  return between(top, bottom, down);
}

template <typename T>
__device__ __forceinline__ const T* first_plane(const UpsampleCrossEntropyParams& p, int64_t b) {
  return static_cast<const T*>(p.logits) + b * p.logits_strides[0];
}

__device__ __forceinline__ int64_t label_at(const UpsampleCrossEntropyParams& p, int64_t b,
                                            int64_t y, int64_t x) {
  return p.labels[b * p.labels_strides[0] + y * p.labels_strides[1] + x];
}

__device__ __forceinline__ bool counts(const UpsampleCrossEntropyParams& p, int64_t label) {
  return label != p.ignore_index && label >= 0 && label < p.classes;
}

__device__ __forceinline__ float weight_of(const UpsampleCrossEntropyParams& p, int64_t label) {
  return p.has_weight ? p.weight[label] : 1.0f;
}

}  // namespace mimkernels::cuda

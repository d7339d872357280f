// Mean and variance of a row, right to the last places however far the row is from 0.
#pragma once

#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

template <typename T>
MIMKERNELS_INLINE float sum_of(const T* row, int64_t n) {
  Pack16 sum = broadcast<16>(0.0f);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) sum = sum + load<16>(row + j);
  if (j < n) sum = sum + load_some<16>(row + j, n - j);
  return sum_lanes(sum);
}

// Means of the deviations of a row from a number, and of their squares.
struct Moments {
  float first;
  float second;
};

template <typename T>
MIMKERNELS_INLINE Moments moments_about(const T* row, float center, int64_t n, float count) {
  const Pack16 centers = broadcast<16>(center);
  Pack16 first = broadcast<16>(0.0f);
  Pack16 second = broadcast<16>(0.0f);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    const Pack16 deviation = load<16>(row + j) - centers;
    first = first + deviation;
    second = second + deviation * deviation;
  }
  if (j < n) {
    const Pack16 deviation = keep_first(load_some<16>(row + j, n - j) - centers, n - j);
    first = first + deviation;
    second = second + deviation * deviation;
  }
  return {sum_lanes(first) / count, sum_lanes(second) / count};
}

// The mean, and 1 / sqrt(variance + eps).
struct Statistics {
  float mean;
  float rstd;
};

MIMKERNELS_INLINE Statistics statistics_of(const Moments& about, float center, float eps) {
  const float variance = about.second - about.first * about.first;
  return {center + about.first, 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

// Whether the deviations are so far from 0 on average that their squares say little.
MIMKERNELS_INLINE bool cancels(const Moments& about) {
  return about.first * about.first * 64.0f > about.second;
}

// Of a row by its sum.
template <typename T>
MIMKERNELS_INLINE Statistics statistics_of(const T* row, float sum, float eps, int64_t n) {
  const float count = static_cast<float>(max_of(1, n));  // no channels have mean 0
  float mean = sum / count;
  Moments about = moments_about(row, mean, n, count);
  // Where the sum's rounding is not small beside the deviations.
  if (cancels(about)) {
    mean += about.first;
    about = moments_about(row, mean, n, count);
  }
  return statistics_of(about, mean, eps);
}

}  // namespace mimkernels::MIMKERNELS_ISA

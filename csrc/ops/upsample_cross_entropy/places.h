// Where the centre of a label pixel lies among the logits, along one axis, in whole numbers: the
// same on every device and instruction set.
#pragma once

#include <cstdint>

// Static and always inline on the host: this header is compiled once per instruction set, and a
// shared out-of-line copy could be one that the running CPU cannot execute.
#if defined(__CUDACC__)
#define MIMKERNELS_PLACES_INLINE static __host__ __device__ __forceinline__
#else
#define MIMKERNELS_PLACES_INLINE static inline __attribute__((always_inline))
#endif

namespace mimkernels {

// Label pixel i of `target` lies at max(0, i * step - back) / unit among `source` logits. The
// logits between which it lies are number `cell` and the next, or twice the last one.
struct Places {
  int64_t source = 1;
  int64_t target = 0;
  int64_t step = 1;
  int64_t back = 0;
  int64_t unit = 1;
};

MIMKERNELS_PLACES_INLINE Places places_of(int64_t source, int64_t target, bool align_corners) {
  Places places;
  places.source = source;
  places.target = target;
  if (align_corners) {  // i * (source - 1) / (target - 1)
    places.step = source - 1;
    places.unit = target > 1 ? target - 1 : 1;
  } else {  // (i + 1/2) * source / target - 1/2
    places.step = 2 * source;
    places.back = target - source;
    places.unit = 2 * target;
  }
  return places;
}

MIMKERNELS_PLACES_INLINE int64_t scaled_place(const Places& places, int64_t i) {
  const int64_t at = i * places.step - places.back;
  return at > 0 ? at : 0;
}

MIMKERNELS_PLACES_INLINE int64_t cell_of(const Places& places, int64_t i) {
  return scaled_place(places, i) / places.unit;
}

// The weight of the second of the two logits.
MIMKERNELS_PLACES_INLINE float second_weight(const Places& places, int64_t i) {
  return static_cast<float>(scaled_place(places, i) % places.unit) /
         static_cast<float>(places.unit);
}

// The first label pixel of a cell; that of cell `source` is `target`.
MIMKERNELS_PLACES_INLINE int64_t first_of_cell(const Places& places, int64_t cell) {
  if (cell <= 0 || places.target == 0) return 0;
  if (cell >= places.source || places.step == 0) return places.target;
  const int64_t wanted = cell * places.unit + places.back;  // the least i * step
  const int64_t first = wanted <= 0 ? 0 : (wanted + places.step - 1) / places.step;
  return first < places.target ? first : places.target;
}

}  // namespace mimkernels

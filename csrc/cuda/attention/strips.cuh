// Products of several strips of 16 tokens per warp, 16-bit elements: what a warp loads of the other
// side's rows serves all its strips. tile.cuh has groups, rows and fragments.
#pragma once

#include <bit>

#include "cuda/attention/tile.cuh"

namespace mimkernels::cuda {

// ---- rows ----

// Lanes that share a row of CHUNKS chunks, a power of two: the place of a thread costs no division.
template <int CHUNKS>
constexpr int kRowLanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(CHUNKS)));

// load_rows where every row of `from` starts on 16 bytes: `workers`, a multiple of a warp, start the
// copies of `count` rows, of which `valid` exist.
template <int CHUNKS, typename T>
__device__ __forceinline__ void copy_rows(T* to, int stride, const T* from, int64_t from_stride,
                                          int count, int valid, int dim, int worker, int workers) {
  static_assert(CHUNKS <= 16);
  const int feature = worker % kRowLanes<CHUNKS> * kChunk<T>;
  if (feature >= CHUNKS * kChunk<T>) {
    return;
  }
  const int step = workers / kRowLanes<CHUNKS>;
  const int first = worker / kRowLanes<CHUNKS>;
  const int last = feature < dim ? valid : 0;  // rows from here on are zeros
  const T* source = from + first * from_stride + feature;
  T* target = to + first * stride + feature;
  int row = first;
  const auto copy = [&] {
    cuda::copy_async(target, source, row < last);
    row += step;
    source += step * from_stride;
    target += step * stride;
  };
  while (row + 3 * step < count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy();
    }
  }
#pragma unroll 1
  while (row < count) {
    copy();
  }
}

// The same, wherever rows start.
template <int CHUNKS, typename T>
__device__ __forceinline__ void load_rows_of(T* to, int stride, const T* from, int64_t from_stride,
                                             int count, int valid, int dim, bool aligned,
                                             int worker, int workers) {
  if (aligned) {
    copy_rows<CHUNKS>(to, stride, from, from_stride, count, valid, dim, worker, workers);
  } else {
    load_rows(to, stride, CHUNKS, from, from_stride, count, valid, dim, false, worker, workers);
  }
}

// `rows` rows of shared memory, by the lanes of a warp, to rows on 16 bytes.
template <int CHUNKS, int ROWS, typename T>
__device__ __forceinline__ void store_rows(T* out, int64_t out_stride, const T* from, int stride,
                                           int rows, int dim) {
  constexpr int kStep = kWarp / kRowLanes<CHUNKS>;
  const int lane = threadIdx.x % kWarp;
  const int feature = lane % kRowLanes<CHUNKS> * kChunk<T>;
  const int first = lane / kRowLanes<CHUNKS>;
  const int last = feature < dim ? rows : 0;
#pragma unroll
  for (int i = 0; i < ROWS; i += kStep) {
    const int row = first + i;
    if (row < last) {
      *reinterpret_cast<uint4*>(out + row * out_stride + feature) =
          *reinterpret_cast<const uint4*>(from + row * stride + feature);
    }
  }
}

// ---- products ----

// The fragments of STRIPS strips as left operand, for as long as the warp needs them.
template <int STRIPS, int STEPS, typename T>
__device__ __forceinline__ void load_left(uint32_t (&left)[STRIPS][STEPS][4], const T* rows,
                                          int stride) {
  const T* const row = left_row(rows, stride);
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      load_matrices(left[s][step], row + s * kStrip * stride + step * kStep<T>);
    }
  }
}

// d[s][j] = products of strip s with `groups` of the GROUPS times 16 rows at `right`, an address of
// right_row; each is loaded once for all strips.
template <typename T, int STRIPS, int GROUPS, int STEPS>
__device__ __forceinline__ void multiply_strips(float (&d)[STRIPS][GROUPS][2][4],
                                                const uint32_t (&left)[STRIPS][STEPS][4],
                                                const T* right, int stride, int groups = GROUPS) {
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      clear(d[s][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) {
    if (j >= groups) {
      continue;
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      uint32_t b[4];
      load_matrices(b, right + j * kStrip * stride + step * kStep<T>);
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        multiply_add<T>(d[s][j][0], left[s][step], b[0], b[1]);
        multiply_add<T>(d[s][j][1], left[s][step], b[2], b[3]);
      }
    }
  }
}

// A group as left operand, rounded to T.
template <typename T>
__device__ __forceinline__ void pack_group(uint32_t (&left)[4], const float (&w)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    left[i] = pack_two<T>(w[i / 2][i % 2 * 2], w[i / 2][i % 2 * 2 + 1]);
  }
}

// acc[s] += w[s] rows: packed groups of every strip with 16 rows of TILES * 8 features at an address
// of left_row, each loaded once for all strips. As add_weighted lays it out.
template <typename T, int STRIPS, int TILES>
__device__ __forceinline__ void add_weighted_strips(float (&acc)[STRIPS][TILES][4],
                                                    const uint32_t (&w)[STRIPS][4], const T* row) {
#pragma unroll
  for (int n = 0; n < TILES; n += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, row + n * 8);
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) {
      multiply_add<T>(acc[s][n], w[s], b[0], b[1]);
      multiply_add<T>(acc[s][n + 1], w[s], b[2], b[3]);
    }
  }
}

// ---- positions ----

// Distances of a lane's elements of a group from tokens' places in shared memory: `planes` times
// `tokens` pairs of coordinates.
__device__ __forceinline__ void point_distances(float (&d)[2][4], const float2* points, int tokens,
                                                int planes, int last, int first_row,
                                                int first_column) {
  const int lane = threadIdx.x % kWarp;
  const int row = first_row + lane / 4;
  const int column = first_column + lane % 4 * 2;
  clear(d);
#pragma unroll 1
  for (int plane = 0; plane < planes; ++plane, points += tokens) {
    const float2 from[2] = {points[min(row, last)], points[min(row + 8, last)]};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const float4 to = *reinterpret_cast<const float4*>(points + column + 8 * u);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = from[e / 2].x - (e % 2 == 0 ? to.x : to.z);
        const float y = from[e / 2].y - (e % 2 == 0 ? to.y : to.w);
        d[u][e] = fmaf(x, x, fmaf(y, y, d[u][e]));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    d[i / 4][i % 4] = sqrt_fast(d[i / 4][i % 4]);
  }
}

}  // namespace mimkernels::cuda

// What the attention kernels share: rows of tokens in shared memory and products of 16 x 16 groups of
// queries and keys on tensor cores. scores.cuh has what makes scores of the products.
//
// A group is d[2][4] per lane: with g = lane / 4 and t = lane % 4, d[u][e] is row g + 8 * (e / 2)
// and column 8 * u + 2 * t + e % 2. Rows are the tokens of the warp's strip, columns those of the
// other side.
#pragma once

#include "cuda/attention/tiling.h"
#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace mimkernels::cuda {

constexpr float kInfinity = __builtin_inff();
constexpr float kLn2 = 0.6931471805599453f;
// Where exponents end: their product with a probability of 0 must be 0.
constexpr float kLeastExponent = -1000.0f;
// Of cosine attention: ln 100, and the least length of q and k that counts.
constexpr double kLargestLogitScale = 4.605170185988091;
constexpr float kLeastLength = 1e-12f;
constexpr float kLargestHalf = 65504.0f;

// Elements of T in 16 bytes.
template <typename T>
constexpr int kChunk = 16 / sizeof(T);

// 16 bytes of a row's features: one load where they are `aligned`.
template <typename T>
__device__ __forceinline__ void load_chunk(T (&elements)[kChunk<T>], const T* from, bool aligned) {
  if (aligned) {
    const uint4 word = *reinterpret_cast<const uint4*>(from);
    memcpy(elements, &word, sizeof(word));
  } else {
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      elements[e] = from[e];
    }
  }
}

// Elements of T that one product of fragments contracts: 32 bytes of each row.
template <typename T>
constexpr int kStep = 32 / sizeof(T);

// Between rows in shared memory: an odd number of chunks, so that a column of chunks meets every
// bank once.
template <typename T>
__host__ __device__ constexpr int row_stride(int padded_dim) {
  return padded_dim + kChunk<T>;
}

// Sizes of rows in shared memory that kernels without a size of their own in the type take.
template <typename T>
struct RowShape {
  int steps = 0;
  int chunks = 0;
  int stride = 0;

  explicit RowShape(int64_t dim)
      : steps(int_ceil_div(dim, kStep<T>)),
        chunks(2 * steps),
        stride(row_stride<T>(steps * kStep<T>)) {}
};

// Exponents of 16-bit inputs are base 2, with log2(e) in the factor of the scores; those of fp32
// stay base e, where a product would be rounded once more.
template <typename T>
constexpr bool kExact = std::is_same_v<T, float>;
template <typename T>
constexpr float kUnitsOfOne = kExact<T> ? 1.0f : kLog2E;
template <typename T>
constexpr float kOneUnit = kExact<T> ? 1.0f : kLn2;

template <typename T>
__device__ __forceinline__ float power(float t) {
  if constexpr (kExact<T>) {
    return expf(t);
  } else {
    return exp2_fast(t);
  }
}

// A sum of the four lanes of a row, in all of them.
__device__ __forceinline__ float add_quad(float x) {
  x += __shfl_xor_sync(kWarpMask, x, 1);
  return x + __shfl_xor_sync(kWarpMask, x, 2);
}

__device__ __forceinline__ float max_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarpMask, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarpMask, x, 2));
}

__device__ __forceinline__ int min_quad(int x) {
  x = min(x, __shfl_xor_sync(kWarpMask, x, 1));
  return min(x, __shfl_xor_sync(kWarpMask, x, 2));
}

// ---- rows ----

// Starts copying `count` rows, of which `valid` exist, from global memory to shared memory,
// `chunks` chunks each; zeros stand beyond the last row and beyond feature `dim`. `worker` is one
// of `workers` threads that share the copy. Where rows are not aligned it is done on return.
template <typename T>
__device__ __forceinline__ void load_rows(T* to, int stride, int chunks, const T* from,
                                          int64_t from_stride, int count, int valid, int dim,
                                          bool aligned, int worker, int workers) {
  for (int i = worker; i < count * chunks; i += workers) {
    const int row = i / chunks;
    const int feature = (i - row * chunks) * kChunk<T>;
    const bool inside = row < valid && feature < dim;
    const T* const source = inside ? from + row * from_stride + feature : from;
    T* const target = to + row * stride + feature;
    if (aligned) {
      cuda::copy_async(target, source, inside);
    } else {
#pragma unroll 1
      for (int e = 0; e < kChunk<T>; ++e) {
        target[e] = inside ? source[e] : from_float<T>(0.0f);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ const T* head_at(const HeadRows& rows, int b, int h, int token) {
  return static_cast<const T*>(rows.data) + b * rows.stride_batch + h * rows.stride_head +
         token * rows.stride_token;
}

// Where a warp works.
struct WarpPlace {
  int first_head = 0;  // of the block, among the heads of all images
  int local_head = 0;  // of the block's heads, the warp's
  int head = 0;
  int first = 0;  // token of the strip
  int warp = 0;
  int lane = 0;
  bool busy = false;

  // `own` tokens of a warp. With an opaque `zero` of its own a second place is not the first one, kept
  // in registers.
  __device__ __forceinline__ WarpPlace(const StripTiling& tiling, int all_heads, int tokens,
                                       int own = kStrip, int zero = 0)
      : warp((static_cast<int>(threadIdx.x) + zero) / kWarp),
        lane((static_cast<int>(threadIdx.x) + zero) % kWarp) {
    const int block = static_cast<int>(blockIdx.x) + zero;
    first_head = block / tiling.row_blocks * tiling.heads;
    local_head = warp / tiling.strips;
    head = first_head + local_head;
    first = (block % tiling.row_blocks * tiling.strips + warp % tiling.strips) * own;
    busy = local_head < tiling.heads && head < all_heads && first < tokens;
  }
};

// The warp's strip, by its own lanes.
template <typename T>
__device__ __forceinline__ void load_strip(T* to, int stride, int chunks, const HeadRows& rows,
                                           int heads, const WarpPlace& place, int tokens, int dim,
                                           bool aligned) {
  const int head = place.busy ? place.head : place.first_head;
  load_rows(to, stride, chunks,
            head_at<T>(rows, head / heads, head % heads, 0) +
                (place.busy ? place.first * rows.stride_token : 0),
            rows.stride_token, kStrip, place.busy ? tokens - place.first : 0, dim, aligned,
            static_cast<int>(threadIdx.x) % kWarp, kWarp);
}

// A tile of every head of the block, by all threads.
template <typename T>
__device__ __forceinline__ void load_tile(T* to, int stride, int chunks, const HeadRows& rows,
                                          int images, int heads, const StripTiling& tiling,
                                          int first_head, int tile, int tokens, int dim,
                                          bool aligned) {
  const int first = tile * tiling.tile;
  for (int i = 0; i < tiling.heads && first_head + i < images * heads; ++i) {
    const int b = (first_head + i) / heads;
    const int h = (first_head + i) % heads;
    load_rows(to + i * tiling.tile * stride, stride, chunks, head_at<T>(rows, b, h, first),
              rows.stride_token, tiling.tile, tokens - first, dim, aligned,
              static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  }
}

// ---- products ----

// Those of 16-bit elements run on tensor cores; those of fp32 are fused multiply-adds, which round
// as plain fp32 does and keep infinities, at some cost in speed.

// The address that this lane gives to load one step of 16 rows as left operand (plus step *
// kStep), or of 16 rows by two chunks of features transposed.
template <typename T>
__device__ __forceinline__ int left_offset(int lane, int stride) {
  return lane % 16 * stride + lane / 16 * kChunk<T>;
}
template <typename T>
__device__ __forceinline__ const T* left_row(const T* rows, int stride) {
  return rows + left_offset<T>(threadIdx.x % kWarp, stride);
}

// The same for 16 rows as right operand, whose product contracts features.
template <typename T>
__device__ __forceinline__ int right_offset(int lane, int stride) {
  return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * kChunk<T>;
}
template <typename T>
__device__ __forceinline__ const T* right_row(const T* rows, int stride) {
  return rows + right_offset<T>(threadIdx.x % kWarp, stride);
}

__device__ __forceinline__ void clear(float (&d)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    d[i / 4][i % 4] = 0.0f;
  }
}

// d += one step's products of 16 rows, loaded from left_row, with 16 rows at an address of
// right_row.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&d)[2][4], const uint32_t (&left)[4],
                                              const T* right) {
  uint32_t b[4];
  load_matrices(b, right);
  multiply_add<T>(d[0], left, b[0], b[1]);
  multiply_add<T>(d[1], left, b[2], b[3]);
}

__device__ __forceinline__ float4 load_four(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}

__device__ __forceinline__ float add_products(float sum, float4 x, float4 y) {
  return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
}

// d = products of 16 rows with 16 rows over `steps` steps of features.
template <typename T>
__device__ __forceinline__ void multiply_rows(float (&d)[2][4], const T* left, const T* right,
                                              int stride, int steps) {
  clear(d);
  if constexpr (kExact<T>) {
    const int lane = threadIdx.x % kWarp;
    left += lane / 4 * stride;
    right += lane % 4 * 2 * stride;
#pragma unroll 2
    for (int i = 0; i < steps * kStep<T>; i += 4) {
      const float4 a[2] = {load_four(left + i), load_four(left + 8 * stride + i)};
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const float4 b[2] = {load_four(right + 8 * u * stride + i),
                             load_four(right + (8 * u + 1) * stride + i)};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          d[u][e] = add_products(d[u][e], a[e / 2], b[e % 2]);
        }
      }
    }
  } else {
    left = left_row(left, stride);
    right = right_row(right, stride);
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
      uint32_t a[4];
      load_matrices(a, left + step * kStep<T>);
      multiply_step<T>(d, a, right + step * kStep<T>);
    }
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack_two(float x, float y) {
  const T pair[2] = {from_float<T>(x), from_float<T>(y)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// The first of the two neighbouring features that acc[n][0] and [1], or [2] and [3], belong to.
template <typename T>
__device__ __forceinline__ int feature_of(int n) {
  const int t = threadIdx.x % 4;
  return kExact<T> ? n / 2 * 16 + t * 4 + n % 2 * 2 : n * 8 + t * 2;
}

// acc += w rows: the group w as left operand, 16 rows of TILES * 8 features as right one. acc[n][e]
// is of row g + 8 * (e / 2) and of feature_of(n) + e % 2.
template <typename T, int TILES>
__device__ __forceinline__ void add_weighted(float (&acc)[TILES][4], const float (&w)[2][4],
                                             const T* rows, int stride) {
  if constexpr (kExact<T>) {
    const int lane = threadIdx.x % kWarp;
    // Lane t of the four that share a row has columns 2t, 2t + 1, 8 + 2t and 9 + 2t, which are
    // summed first: over a thousand keys one long sum would lose digits.
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
      float upper[4];
      float lower[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        upper[i] = __shfl_sync(kWarpMask, w[i / 2][i % 2], lane / 4 * 4 + t);
        lower[i] = __shfl_sync(kWarpMask, w[i / 2][2 + i % 2], lane / 4 * 4 + t);
      }
      const float* const first = rows + 2 * t * stride + lane % 4 * 4;
#pragma unroll
      for (int n = 0; n < TILES; n += 2) {
        float4 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = load_four(first + (8 * (i / 2) + i % 2) * stride + n * 8);
        }
        const auto add = [&](float& sum, const float (&weight)[4], float x0, float x1, float x2,
                             float x3) {
          sum += fmaf(weight[3], x3, fmaf(weight[2], x2, fmaf(weight[1], x1, weight[0] * x0)));
        };
        add(acc[n][0], upper, x[0].x, x[1].x, x[2].x, x[3].x);
        add(acc[n][1], upper, x[0].y, x[1].y, x[2].y, x[3].y);
        add(acc[n][2], lower, x[0].x, x[1].x, x[2].x, x[3].x);
        add(acc[n][3], lower, x[0].y, x[1].y, x[2].y, x[3].y);
        add(acc[n + 1][0], upper, x[0].z, x[1].z, x[2].z, x[3].z);
        add(acc[n + 1][1], upper, x[0].w, x[1].w, x[2].w, x[3].w);
        add(acc[n + 1][2], lower, x[0].z, x[1].z, x[2].z, x[3].z);
        add(acc[n + 1][3], lower, x[0].w, x[1].w, x[2].w, x[3].w);
      }
    }
  } else {
    const uint32_t left[4] = {pack_two<T>(w[0][0], w[0][1]), pack_two<T>(w[0][2], w[0][3]),
                              pack_two<T>(w[1][0], w[1][1]), pack_two<T>(w[1][2], w[1][3])};
    const T* const row = left_row(rows, stride);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, row + n * 8);
      multiply_add<T>(acc[n], left, b[0], b[1]);
      multiply_add<T>(acc[n + 1], left, b[2], b[3]);
    }
  }
}

// The strip's rows acc * factor[row], rounded, to the strip's own shared memory, for its warp.
template <typename T, int TILES>
__device__ __forceinline__ void stage_strip(const float (&acc)[TILES][4], float factor0,
                                            float factor1, T* strip, int stride) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* const to = strip + (lane / 4 + 8 * half) * stride + feature_of<T>(n);
      const float factor = half == 0 ? factor0 : factor1;
      const float x = acc[n][2 * half] * factor;
      const float y = acc[n][2 * half + 1] * factor;
      if constexpr (kExact<T>) {
        *reinterpret_cast<float2*>(to) = make_float2(x, y);
      } else {
        *reinterpret_cast<uint32_t*>(to) = pack_two<T>(x, y);
      }
    }
  }
  __syncwarp();
}

// The same to `out`, of which whole chunks are stored.
template <typename T, int TILES>
__device__ __forceinline__ void store_strip(const float (&acc)[TILES][4], float factor0,
                                            float factor1, T* strip, int stride, T* out,
                                            int64_t out_stride, int rows, int dim) {
  stage_strip(acc, factor0, factor1, strip, stride);
  const int lane = threadIdx.x % kWarp;
  const int chunks = dim / kChunk<T>;
  for (int i = lane; i < kStrip * chunks; i += kWarp) {
    const int row = i / chunks;
    const int feature = (i - row * chunks) * kChunk<T>;
    if (row < rows) {
      *reinterpret_cast<uint4*>(out + row * out_stride + feature) =
          *reinterpret_cast<const uint4*>(strip + row * stride + feature);
    }
  }
}

// ---- launching ----

inline bool aligned_rows(const HeadRows& rows, int64_t size) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_batch * size % 16 == 0 &&
         rows.stride_head * size % 16 == 0 && rows.stride_token * size % 16 == 0;
}

}  // namespace mimkernels::cuda

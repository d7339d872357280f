// Fragments come from global memory, 16 bytes per lane, with neither shared memory nor a transpose:
// features may be contracted in any order, and any columns may lie beside each other in a tile.
// With g = lane / 4 and t = lane % 4:
//   dots      lane t contracts features 8t to 8t + 7 of 32: the pairs of its word are the operands
//             at 2t and 2t + 8 of two products
//   columns   lane g holds columns 8g to 8g + 7 of 64 in two rows of 8: element j of the words is
//             the operand of tile j, so that a lane ends with 16 neighbouring columns
// Weights are fp32: their products are of TF32, which holds 16-bit tokens exactly and has fp32's
// range.
#include "cuda/pooling/matrix_products.h"

#include "cuda/device.cuh"
#include "cuda/pooling/pool.cuh"
#include "cuda/pooling/token_pool_tiling.h"

namespace mimkernels::cuda {
namespace {

constexpr int kVec = 8;             // elements of a word
constexpr int kStripTokens = 16;    // rows of a product
constexpr int kColumns = 8 * kVec;  // of a warp
constexpr int kTiles = 8;           // of 8 columns each
constexpr int kMatrixThreads = kMatrixWarps * kWarp;
constexpr int kMostStrips = 8;  // that a warp writes with the vectors it has read
using MatrixWord = uint4;

__device__ __forceinline__ MatrixWord load_word(const MatrixWord* row, int word, int words) {
  return row != nullptr && word < words ? __ldg(row + word) : MatrixWord{};
}

// d[r][tile] += weights[r] . 8 rows of 8 words of columns, of which this lane has words g of rows t
// and t + 4.
template <typename T, int ROWS>
__device__ __forceinline__ void add_columns(float (&d)[ROWS][kTiles][4],
                                            const uint32_t (&weights)[ROWS][4], MatrixWord upper,
                                            MatrixWord lower) {
  float above[kVec];
  float below[kVec];
  unpack_word<T, kVec>(above, upper);
  unpack_word<T, kVec>(below, lower);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      multiply_add_tf32(d[r][j], weights[r], __float_as_uint(above[j]), __float_as_uint(below[j]));
    }
  }
}

// This element of every tile, which are 8 neighbouring columns, times scale.
template <typename Out>
__device__ __forceinline__ void store_columns(Out* to, const float (&d)[kTiles][4], int element,
                                              float scale) {
  constexpr int kOut = 16 / sizeof(Out);
#pragma unroll
  for (int i = 0; i < kVec / kOut; ++i) {
    float values[kOut];
#pragma unroll
    for (int e = 0; e < kOut; ++e) {
      values[e] = d[i * kOut + e][element] * scale;
    }
    reinterpret_cast<uint4*>(to)[i] = pack<Out, kOut>(values);
  }
}

// grid:     blocks of 128 threads; a warp owns 16 tokens of an image and VECTORS vectors, tokens
//           fastest; then loops
// in:       x [B, N, D], vectors [B, G, D] by stride, last stride 1; mask bool [B, N] by stride, or
//           none
// out:      out fp32 [B, G, N], every element written exactly once, 0 where a token is not allowed
// numerics: products of 16-bit elements on tensor cores, sums in fp32
// bounds:   tails and tokens that are not allowed read as zeros; offsets are int64
// cost:     x read G / VECTORS times, 4 words per thread prefetched; vectors from L1, once per 16
//           tokens; no shared memory, no atomics, deterministic
template <typename T, int VECTORS>
__global__ void __launch_bounds__(kMatrixThreads, 5)
    matrix_dots_kernel(TokenProducts p, AllowedTokens allowed, Rows vectors, float* out, int words,
                       int64_t token_blocks, int64_t group_blocks) {
  constexpr int TILES = VECTORS / 8;
  const int lane = threadIdx.x % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const int64_t items = p.batch * group_blocks * token_blocks;
  for (int64_t item = blockIdx.x * int64_t{kMatrixWarps} + threadIdx.x / kWarp; item < items;
       item += gridDim.x * int64_t{kMatrixWarps}) {
    int64_t token_block, group_block;
    const int64_t b = divide(divide(item, token_blocks, token_block), group_blocks, group_block);
    const int64_t n = token_block * kStripTokens + g;
    const int64_t first = group_block * VECTORS;
    const MatrixWord* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows[i] = allowed(b, n + 8 * i)
                    ? reinterpret_cast<const MatrixWord*>(row_at<T>(p.x, b, n + 8 * i))
                    : nullptr;
    }
    const T* const right = row_at<T>(vectors, b, first + g);
    const int right_count = static_cast<int>(min(p.groups - first, int64_t{VECTORS})) - g;
    // Two blocks of 32 features at a time.
    MatrixWord next[2][2];
    const auto load = [&](int v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        next[i / 2][i % 2] = load_word(rows[i % 2], v + i / 2 * 4 + t, words);
      }
    };
    float d[TILES][4] = {};
    load(0);
#pragma unroll 1
    for (int v = 0; v < words; v += 8) {
      MatrixWord x[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i / 2][i % 2] = next[i / 2][i % 2];
      }
      load(v + 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t left[2][4] = {{x[i][0].x, x[i][1].x, x[i][0].y, x[i][1].y},
                                     {x[i][0].z, x[i][1].z, x[i][0].w, x[i][1].w}};
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
          const auto* const row =
              reinterpret_cast<const MatrixWord*>(right + 8 * j * vectors.stride1);
          const MatrixWord y = load_word(8 * j < right_count ? row : nullptr, v + 4 * i + t, words);
          multiply_add<T>(d[j], left[0], y.x, y.y);
          multiply_add<T>(d[j], left[1], y.z, y.w);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t vector = first + 8 * j + 2 * t + e % 2;
        const int64_t token = n + e / 2 * 8;
        if (vector < p.groups && token < p.tokens) {
          // Vectors may hold NaN, which tokens that are not looked at must not meet.
          const float dot = rows[e / 2] != nullptr ? d[j][e] * p.scale : 0.0f;
          out[(b * p.groups + vector) * p.tokens + token] = dot;
        }
      }
    }
  }
}

// grid:     blocks of 128 threads; a warp owns 64 columns of an image and VECTORS rows of weights,
//           columns fastest; then loops
// in:       weights fp32 [B, G, N]; x [B, N, D] by stride, last stride 1; mask bool [B, N] by
//           stride, or none
// out:      [B, G, D] contiguous, every element written exactly once
// numerics: weights rounded to TF32, sums in fp32, tokens in order, rounded once
// bounds:   tails are masked, tokens that are not allowed not read; offsets are int64
// cost:     x read G / VECTORS times, 4 words per thread prefetched; weights from L1, once per 64
//           columns; no shared memory, no atomics, deterministic
template <typename T, int VECTORS, typename Out>
__global__ void __launch_bounds__(kMatrixThreads, VECTORS == 16 ? 4 : 3)
    matrix_weigh_kernel(TokenProducts p, AllowedTokens allowed, const float* weights, Out* out,
                        int words, int64_t chunks, int64_t group_blocks) {
  constexpr int ROWS = VECTORS / 16;
  constexpr int STEPS = kStripTokens / 8;
  const int lane = threadIdx.x % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const int64_t items = p.batch * group_blocks * chunks;
  for (int64_t item = blockIdx.x * int64_t{kMatrixWarps} + threadIdx.x / kWarp; item < items;
       item += gridDim.x * int64_t{kMatrixWarps}) {
    int64_t chunk, group_block;
    const int64_t b = divide(divide(item, chunks, chunk), group_blocks, group_block);
    const int64_t first = group_block * VECTORS;
    const int word = static_cast<int>(chunk) * 8 + g;
    const int tokens = static_cast<int>(p.tokens);
    const T* column = row_at<T>(p.x, b, t) + int64_t{word} * kVec;
    MatrixWord next[2 * STEPS];
    const auto load = [&](int n) {
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) {
        const bool wanted = word < words && allowed(b, n + 4 * i + t);
        next[i] = wanted ? __ldg(reinterpret_cast<const MatrixWord*>(column)) : MatrixWord{};
        column += 4 * p.x.stride1;
      }
    };
    const float* const rows = weights + (b * p.groups + first + g) * p.tokens + t;
    const int row_count = static_cast<int>(min(p.groups - first, int64_t{VECTORS})) - g;
    float d[ROWS][kTiles][4] = {};
    load(0);
#pragma unroll 1
    for (int n = 0; n < tokens; n += kStripTokens) {
      MatrixWord x[2 * STEPS];
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) {
        x[i] = next[i];
      }
      load(n + kStripTokens);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const float* row = rows + n + 8 * step;
        uint32_t left[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const bool inside = 16 * r + 8 * i < row_count;
            const int above = n + 8 * step + t;
            left[r][i] = to_tf32(inside && above < tokens ? __ldg(row) : 0.0f);
            left[r][i + 2] = to_tf32(inside && above + 4 < tokens ? __ldg(row + 4) : 0.0f);
            row += 8 * tokens;
          }
        }
        add_columns<T>(d, left, x[2 * step], x[2 * step + 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t row = first + 16 * r + e / 2 * 8 + g;
        const int64_t to = chunk * 8 + 2 * t + e % 2;
        if (row < p.groups && to < words) {
          store_columns(out + (b * p.groups + row) * p.dim + to * kVec, d[r], e, p.scale);
        }
      }
    }
  }
}

// grid:     blocks of 128 threads; a warp owns 64 columns of up to 128 tokens of an image, columns
//           fastest; then loops
// in:       weights fp32 [B, G, N] and vectors [B, G, D] by stride, last stride 1, of TERMS terms;
//           mask bool [B, N] by stride, or none
// out:      out [B, N, D] contiguous, every element written exactly once
// numerics: scaled weights rounded to TF32, sums in fp32, the first term's vectors before the
//           second's, rounded once
// bounds:   tails are masked, zeros where a token is not allowed; offsets are int64
// cost:     out written once; up to VECTORS vectors read once per warp and kept in registers, more
//           from L1 or L2 once per 16 tokens; no shared memory, no atomics, deterministic
template <typename T, int VECTORS, int TERMS>
__global__ void __launch_bounds__(kMatrixThreads, VECTORS* TERMS > 32 ? 2 : 3)
    matrix_spread_kernel(TokenProducts p, AllowedTokens allowed, TokenSpread first,
                         TokenSpread second, T* out, int words, int64_t chunks,
                         int64_t strip_blocks, int64_t strips) {
  constexpr int STEPS = VECTORS / 8;
  const int lane = threadIdx.x % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const int64_t items = p.batch * strip_blocks * chunks;
  for (int64_t item = blockIdx.x * int64_t{kMatrixWarps} + threadIdx.x / kWarp; item < items;
       item += gridDim.x * int64_t{kMatrixWarps}) {
    int64_t chunk, strip_block;
    const int64_t b = divide(divide(item, chunks, chunk), strip_blocks, strip_block);
    const int word = static_cast<int>(chunk) * 8 + g;
    const int tokens = static_cast<int>(p.tokens);
    const int begin = static_cast<int>(strip_block * strips) * kStripTokens;
    const int end = static_cast<int>(min(p.tokens, begin + strips * kStripTokens));
    MatrixWord vectors[TERMS][STEPS][2];
#pragma unroll 1
    for (int n = begin; n < end; n += kStripTokens) {
      float d[1][kTiles][4] = {};
#pragma unroll 1
      for (int64_t base = 0; base < p.groups; base += VECTORS) {
        const int row_count = static_cast<int>(min(p.groups - base, int64_t{VECTORS})) - t;
        if (n == begin || p.groups > VECTORS) {
#pragma unroll
          for (int term = 0; term < TERMS; ++term) {
            const Rows& from = term == 0 ? first.vectors : second.vectors;
            const T* const rows = row_at<T>(from, b, base + t);
#pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) {
              const auto* const row =
                  reinterpret_cast<const MatrixWord*>(rows + 4 * i * from.stride1);
              vectors[term][i / 2][i % 2] =
                  load_word(4 * i < row_count ? row : nullptr, word, words);
            }
          }
        }
#pragma unroll
        for (int term = 0; term < TERMS; ++term) {
          const TokenSpread& of = term == 0 ? first : second;
          const float* row = of.weights + (b * p.groups + base + t) * p.tokens + n + g;
#pragma unroll
          for (int step = 0; step < STEPS; ++step) {
            uint32_t left[1][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int above = i % 2 * 8;
              const bool inside = 8 * step + i / 2 * 4 < row_count && n + g + above < end;
              left[0][i] = to_tf32(inside ? of.scale * __ldg(row + above) : 0.0f);
              row += i % 2 * 4 * tokens;
            }
            add_columns<T>(d, left, vectors[term][step][0], vectors[term][step][1]);
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = n + e / 2 * 8 + g;
        const int to = static_cast<int>(chunk) * 8 + 2 * t + e % 2;
        if (token < end && to < words) {
          T* const row = out + (b * p.tokens + token) * p.dim + int64_t{to} * kVec;
          // Vectors may hold NaN, which tokens that are not looked at must not meet.
          if (allowed(b, token)) {
            store_columns(row, d[0], e, 1.0f);
          } else {
            *reinterpret_cast<MatrixWord*>(row) = MatrixWord{};
          }
        }
      }
    }
  }
}

// Calls body(T{}, Vectors) with the element type and the vectors of a warp, an integral constant.
template <typename Body>
cudaError_t with_matrix_kind(const TokenProducts& p, const Body& body) {
  const auto with_vectors = [&](auto type) {
    return p.groups <= 16 ? body(type, std::integral_constant<int, 16>{})
                          : body(type, std::integral_constant<int, 32>{});
  };
  switch (p.dtype) {
    case DType::kBFloat16:
      return with_vectors(__nv_bfloat16{});
    case DType::kFloat16:
      return with_vectors(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

int words_of(const TokenProducts& p) { return static_cast<int>(p.dim / kVec); }
int64_t chunks_of(const TokenProducts& p) { return ceil_div(p.dim, kColumns); }

}  // namespace

cudaError_t matrix_token_dots(const TokenProducts& p, const Rows& vectors, float* out,
                              cudaStream_t stream) {
  return with_matrix_kind(p, [&](auto type, auto vectors_per_warp) {
    constexpr int kVectors = decltype(vectors_per_warp)::value;
    const int64_t token_blocks = ceil_div(p.tokens, kStripTokens);
    const int64_t group_blocks = ceil_div(p.groups, kVectors);
    return launch(matrix_dots_kernel<decltype(type), kVectors>,
                  blocks_for(p.batch * group_blocks * token_blocks, kMatrixWarps), kMatrixThreads,
                  0, stream, p, allowed_of(p), vectors, out, words_of(p), token_blocks,
                  group_blocks);
  });
}

cudaError_t matrix_weigh_tokens(const TokenProducts& p, const float* weights, void* out,
                                bool to_float, cudaStream_t stream) {
  return with_matrix_kind(p, [&](auto type, auto vectors_per_warp) {
    using T = decltype(type);
    constexpr int kVectors = decltype(vectors_per_warp)::value;
    const int64_t chunks = chunks_of(p);
    const int64_t group_blocks = ceil_div(p.groups, kVectors);
    const unsigned blocks = blocks_for(p.batch * group_blocks * chunks, kMatrixWarps);
    return to_float ? launch(matrix_weigh_kernel<T, kVectors, float>, blocks, kMatrixThreads, 0,
                             stream, p, allowed_of(p), weights, static_cast<float*>(out),
                             words_of(p), chunks, group_blocks)
                    : launch(matrix_weigh_kernel<T, kVectors, T>, blocks, kMatrixThreads, 0, stream,
                             p, allowed_of(p), weights, static_cast<T*>(out), words_of(p), chunks,
                             group_blocks);
  });
}

cudaError_t matrix_spread_tokens(const TokenProducts& p, const TokenSpread& first,
                                 const TokenSpread& second, void* out, cudaStream_t stream) {
  return with_matrix_kind(p, [&](auto type, auto vectors_per_warp) {
    using T = decltype(type);
    constexpr int kVectors = decltype(vectors_per_warp)::value;
    const int64_t chunks = chunks_of(p);
    const int64_t strips = ceil_div(p.tokens, kStripTokens);
    const int64_t strip_blocks = ceil_div(strips, kMostStrips);
    const int64_t strips_each = ceil_div(strips, strip_blocks);
    const unsigned blocks = blocks_for(p.batch * strip_blocks * chunks, kMatrixWarps);
    const auto run = [&](auto kernel) {
      return launch(kernel, blocks, kMatrixThreads, 0, stream, p, allowed_of(p), first, second,
                    static_cast<T*>(out), words_of(p), chunks, strip_blocks, strips_each);
    };
    return second.weights != nullptr ? run(matrix_spread_kernel<T, kVectors, 2>)
                                     : run(matrix_spread_kernel<T, kVectors, 1>);
  });
}

}  // namespace mimkernels::cuda

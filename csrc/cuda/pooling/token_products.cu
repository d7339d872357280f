#include "cuda/pooling/token_products.h"

#include "cuda/pooling/matrix_products.h"
#include "cuda/pooling/pool.cuh"

namespace mimkernels::cuda {
namespace {

// grid:     blocks of 256 threads; 2^lanes_log2 threads (at most a warp) own 4 tokens and GROUPS
//           vectors, then loop; vectors fastest
// in:       x [B, N, D], vectors [B, G, columns] by stride, last stride 1; vector g meets the
//           columns of x from g * slice on; mask bool [B, N] by stride, or none
// out:      out fp32 [B, G, N], every element written exactly once, 0 where a token is not allowed
// numerics: fp32, each thread's columns in order, then a tree
// bounds:   tails and tokens that are not allowed read as zeros; offsets are int64
// cost:     x read G / GROUPS times, after the first from L1 or L2; 4 + GROUPS independent loads in
//           flight per thread; no shared memory, no atomics, deterministic
template <typename T, int VEC, int GROUPS>
__global__ void __launch_bounds__(kThreads, 2)
    token_dots_kernel(TokenProducts p, AllowedTokens allowed, Rows vectors, float* out, int words,
                      int64_t slice, int lanes_log2, int64_t token_blocks, int64_t group_blocks) {
  using W = Word<T, VEC>;
  const int lanes = 1 << lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t per_block = kThreads >> lanes_log2;
  const int64_t items = p.batch * token_blocks * group_blocks;
  for (int64_t base = blockIdx.x * per_block; base < items; base += gridDim.x * per_block) {
    // Threads without an item go along: all lanes of a warp meet below.
    const int64_t item = base + (threadIdx.x >> lanes_log2);
    const bool busy = item < items;
    int64_t group_block, token_block;
    const int64_t b =
        divide(divide(busy ? item : 0, group_blocks, group_block), token_blocks, token_block);
    const int64_t n = token_block * kTokens;
    const int64_t g = group_block * GROUPS;
    const W* rows[kTokens];
    const W* right[GROUPS];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const bool wanted = busy && allowed(b, n + i);
      rows[i] = wanted ? reinterpret_cast<const W*>(row_at<T>(p.x, b, n + i) + g * slice) : nullptr;
    }
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      const bool wanted = busy && g + j < p.groups;
      right[j] = wanted ? reinterpret_cast<const W*>(row_at<T>(vectors, b, g + j)) : nullptr;
    }
    float sums[kTokens][GROUPS] = {};
    for (int v = lane; v < words; v += lanes) {
      W x[kTokens];
      W y[GROUPS];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        x[i] = rows[i] != nullptr ? __ldg(rows[i] + v) : W{};
      }
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        y[j] = right[j] != nullptr ? __ldg(right[j] + v) : W{};
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          sums[i][j] = add_dot<T, VEC>(sums[i][j], x[i], y[j]);
        }
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          sums[i][j] += __shfl_xor_sync(kWarpMask, sums[i][j], step);
        }
      }
    }
    if (lane != 0) {
      continue;
    }
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (busy && g + j < p.groups && n + i < p.tokens) {
          // Vectors may hold NaN, which tokens that are not looked at must not meet.
          const float dot = rows[i] != nullptr ? sums[i][j] * p.scale : 0.0f;
          out[(b * p.groups + g + j) * p.tokens + n + i] = dot;
        }
      }
    }
  }
}

// grid:     blocks of 256 threads; a block owns 32 words of the columns of one image and GROUPS
//           rows of weights, its warps every eighth batch of 4 tokens; then loops
// in:       weights fp32 [B, G, N]; x [B, N, D] by stride, last stride 1; mask bool [B, N] by
//           stride, or none
// out:      [B, G, D], or where SLICED [B, D], column c with the weights of row c / slice;
//           contiguous, every element written exactly once
// numerics: fp32, each warp's tokens in order, then the warps, rounded once
// bounds:   tails are masked, tokens that are not allowed not read; offsets are int64
// cost:     x read G / GROUPS times, after the first from L2; 4 independent loads per thread,
//           prefetched; 32 * VEC * 32 bytes of shared memory; no atomics, deterministic
template <typename T, int VEC, int GROUPS, bool SLICED, typename Out>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && GROUPS == 1 && !SLICED ? 3 : 2)
    weigh_tokens_kernel(TokenProducts p, AllowedTokens allowed, const float* weights, Out* out,
                        int words, int64_t slice, int64_t group_blocks, int64_t chunks) {
  using W = Word<T, VEC>;
  float* const shared = reinterpret_cast<float*>(shared_memory());  // [8, VEC * 32]
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t items = p.batch * group_blocks * chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t chunk, group_block;
    const int64_t b = divide(divide(item, chunks, chunk), group_blocks, group_block);
    const int64_t g = group_block * GROUPS;
    const int64_t v = chunk * kWarp + lane;
    const bool active = v < words;
    const float* rows[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      int64_t row = g + j < p.groups ? g + j : g;
      if constexpr (SLICED) {
        int64_t column;
        row = active ? divide(v * VEC, slice, column) : 0;
      }
      rows[j] = weights + (b * p.groups + row) * p.tokens;
    }
    float sums[GROUPS][VEC] = {};
    Prefetched<W, kTokens> next;
    const T* from = row_at<T>(p.x, b, warp * kTokens) + v * VEC;
    const auto load = [&](int64_t n) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        next.wanted[i] = active && allowed(b, n + i);
        const W* const word = reinterpret_cast<const W*>(from + i * p.x.stride1);
        next.words[i] = next.wanted[i] ? __ldg(word) : W{};
      }
      from += kWarps * kTokens * p.x.stride1;
    };
    load(warp * kTokens);
    for (int64_t n = warp * kTokens; n < p.tokens; n += kWarps * kTokens) {
      const auto [x, wanted] = next;
      load(n + kWarps * kTokens);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          const float weight = wanted[i] ? __ldg(rows[j] + n + i) : 0.0f;
          add_weighted<T, VEC>(sums[j], weight, x[i]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      sum_warps<VEC>(shared, sums[j]);
      for (int i = threadIdx.x; i < VEC * kWarp; i += kThreads) {
        const int64_t column = column_of<VEC>(chunk, i);
        if (g + j < p.groups && column < p.dim) {
          const int64_t row = SLICED ? b : b * p.groups + g + j;
          out[row * p.dim + column] = from_float<Out>(shared[place_of<VEC>(i)] * p.scale);
        }
      }
      __syncthreads();
    }
  }
}

// grid:     blocks of 256 threads; a warp owns one row of scores, then loops
// in:       scores fp32 [B, G, N] by stride, last stride 1; mask bool [B, N] by stride, or none
// out:      weights fp32 [B, G, N], every element written exactly once; may be the scores
// numerics: fp32
// bounds:   the tail is masked; offsets are int64
// cost:     scores read three times, after the first from L1; no shared memory, no atomics,
//           deterministic
__global__ void __launch_bounds__(kThreads, 4)
    pool_weights_kernel(TokenProducts p, AllowedTokens allowed, Rows scores, bool softmax,
                        float* weights) {
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = p.batch * p.groups;
  for (int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; row < rows;
       row += gridDim.x * int64_t{kWarps}) {
    int64_t g;
    const int64_t b = divide(row, p.groups, g);
    const float* const given = row_at<float>(scores, b, g);
    float level = 0.0f;
    float inverse = 1.0f;
    if (softmax) {
      float most = kMinusInfinity;
      for (int64_t n = lane; n < p.tokens; n += kWarp) {
        most = allowed(b, n) ? fmaxf(most, given[n]) : most;
      }
      level = softmax_level(warp_max(most));
      float total = 0.0f;
      for (int64_t n = lane; n < p.tokens; n += kWarp) {
        total += allowed(b, n) ? expf(given[n] - level) : 0.0f;
      }
      inverse = softmax_inverse(warp_sum(total));
    }
    for (int64_t n = lane; n < p.tokens; n += kWarp) {
      const float score = given[n];
      const float weight = softmax ? expf(score - level) * inverse : score;
      weights[row * p.tokens + n] = allowed(b, n) ? weight : 0.0f;
    }
  }
}

// grid:     blocks of 256 threads; a warp owns one row of scores, then loops
// in:       ds fp32 [B, G, N] holding dout . values; dweights fp32 by stride, or none; weights fp32
//           [B, G, N]; mask bool [B, N] by stride, or none
// out:      ds, in place, every element written exactly once
// numerics: fp32; the sum over tokens is subtracted before the product with the weight
// bounds:   the tail is masked; offsets are int64
// cost:     ds, dweights and weights read twice, the second time from L1; no shared memory, no
//           atomics, deterministic
__global__ void __launch_bounds__(kThreads, 4)
    score_gradients_kernel(TokenProducts p, AllowedTokens allowed, Rows dweights,
                           const float* weights, bool softmax, float* ds) {
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = p.batch * p.groups;
  for (int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; row < rows;
       row += gridDim.x * int64_t{kWarps}) {
    int64_t g;
    const int64_t b = divide(row, p.groups, g);
    const float* const more = dweights.given ? row_at<float>(dweights, b, g) : nullptr;
    const float* const a = weights + row * p.tokens;
    float* const d = ds + row * p.tokens;
    const auto upstream = [&](int64_t n) { return more == nullptr ? d[n] : d[n] + more[n]; };
    float total = 0.0f;
    for (int64_t n = lane; softmax && n < p.tokens; n += kWarp) {
      total += allowed(b, n) ? a[n] * upstream(n) : 0.0f;
    }
    total = warp_sum(total);
    for (int64_t n = lane; n < p.tokens; n += kWarp) {
      const float da = upstream(n);
      d[n] = !allowed(b, n) ? 0.0f : softmax ? a[n] * (da - total) : da;
    }
  }
}

// sums[i] += scale * weights[g, n + i] * vectors[g] of one word of columns.
template <typename T, int VEC>
__device__ __forceinline__ void add_spread(float (&sums)[kTokens][VEC], const TokenSpread& term,
                                           const bool (&wanted)[kTokens], int64_t b, int64_t groups,
                                           int64_t g, int64_t tokens, int64_t n, int64_t word) {
  const float* const weights = term.weights + (b * groups + g) * tokens + n;
  const auto x = __ldg(reinterpret_cast<const Word<T, VEC>*>(row_at<T>(term.vectors, b, g)) + word);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (wanted[i]) {
      add_weighted<T, VEC>(sums[i], term.scale * __ldg(weights + i), x);
    }
  }
}

// grid:     blocks of 256 threads; a thread owns one word of columns of 4 tokens, then loops
// in:       weights fp32 [B, G, N] and vectors [B, G, D] by stride, last stride 1, of two terms;
//           the second one's vectors are slices where SLICED; mask bool [B, N] by stride, or none
// out:      out [B, N, D] contiguous, every element written exactly once
// numerics: fp32, the first term's vectors in order, then the second's, rounded once
// bounds:   tails are masked, zeros where a token is not allowed; offsets are int64
// cost:     out written once; vectors read once per 4 tokens, from L1 or L2; no shared memory, no
//           atomics, deterministic
template <typename T, int VEC, bool SLICED>
__global__ void __launch_bounds__(kThreads, 3)
    spread_tokens_kernel(TokenProducts p, AllowedTokens allowed, TokenSpread first,
                         TokenSpread second, T* out, int64_t words, int64_t slice_words,
                         int64_t token_blocks) {
  using W = Word<T, VEC>;
  const int64_t items = p.batch * token_blocks * words;
  for (int64_t item = blockIdx.x * int64_t{kThreads} + threadIdx.x; item < items;
       item += gridDim.x * int64_t{kThreads}) {
    int64_t v, token_block;
    const int64_t b = divide(divide(item, words, v), token_blocks, token_block);
    const int64_t n = token_block * kTokens;
    bool wanted[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      wanted[i] = allowed(b, n + i);
    }
    float sums[kTokens][VEC] = {};
    if (first.weights != nullptr) {
#pragma unroll 2
      for (int64_t g = 0; g < p.groups; ++g) {
        add_spread<T, VEC>(sums, first, wanted, b, p.groups, g, p.tokens, n, v);
      }
    }
    if (second.weights != nullptr) {
      if constexpr (SLICED) {
        int64_t word;
        const int64_t g = divide(v, slice_words, word);
        add_spread<T, VEC>(sums, second, wanted, b, p.groups, g, p.tokens, n, word);
      } else {
#pragma unroll 2
        for (int64_t g = 0; g < p.groups; ++g) {
          add_spread<T, VEC>(sums, second, wanted, b, p.groups, g, p.tokens, n, v);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (n + i < p.tokens) {
        reinterpret_cast<W*>(out + (b * p.tokens + n + i) * p.dim)[v] = pack<T, VEC>(sums[i]);
      }
    }
  }
}

// Columns that one vector meets.
int64_t slice_of(const TokenProducts& p) { return p.sliced ? p.dim / p.groups : p.dim; }

// Whether x is read in 16-byte words, none of which two slices share.
bool words_fit(const TokenProducts& p) {
  return slice_of(p) * element_size(p.dtype) % 16 == 0 && rows_aligned(p.x, p.dim, p.dtype);
}

template <typename T, int VEC, int GROUPS>
cudaError_t dots_of(const TokenProducts& p, const Rows& vectors, float* out, cudaStream_t stream) {
  const int64_t slice = slice_of(p);
  const int words = static_cast<int>(slice / VEC);
  const int log2 = lanes_log2(words);
  const int64_t token_blocks = ceil_div(p.tokens, kTokens);
  const int64_t group_blocks = ceil_div(p.groups, GROUPS);
  return launch(token_dots_kernel<T, VEC, GROUPS>,
                blocks_for(p.batch * token_blocks * group_blocks, kThreads >> log2), kThreads, 0,
                stream, p, allowed_of(p), vectors, out, words, p.sliced ? slice : 0, log2,
                token_blocks, group_blocks);
}

template <typename T, int VEC, int GROUPS, bool SLICED, typename Out>
cudaError_t weigh_of(const TokenProducts& p, const float* weights, void* out, cudaStream_t stream) {
  const int words = static_cast<int>(p.dim / VEC);
  const int64_t chunks = ceil_div(words, kWarp);
  const int64_t group_blocks = SLICED ? 1 : ceil_div(p.groups, GROUPS);
  constexpr int kShared = kThreads * VEC * static_cast<int>(sizeof(float));
  return launch(weigh_tokens_kernel<T, VEC, GROUPS, SLICED, Out>,
                blocks_for(p.batch * group_blocks * chunks, 1), kThreads, kShared, stream, p,
                allowed_of(p), weights, static_cast<Out*>(out), words, slice_of(p), group_blocks,
                chunks);
}

template <typename T, typename Out>
cudaError_t weigh_of(const TokenProducts& p, const float* weights, void* out, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  if (!words_fit(p)) return weigh_of<T, 1, 1, false, Out>(p, weights, out, stream);
  return p.groups == 1 ? weigh_of<T, kVec, 1, false, Out>(p, weights, out, stream)
                       : weigh_of<T, kVec, 4, false, Out>(p, weights, out, stream);
}

template <typename T, int VEC, bool SLICED>
cudaError_t spread_of(const TokenProducts& p, const TokenSpread& first, const TokenSpread& second,
                      void* out, cudaStream_t stream) {
  const int64_t words = p.dim / VEC;
  const int64_t token_blocks = ceil_div(p.tokens, kTokens);
  return launch(spread_tokens_kernel<T, VEC, SLICED>,
                blocks_for(p.batch * token_blocks * words, kThreads), kThreads, 0, stream, p,
                allowed_of(p), first, second, static_cast<T*>(out), words, slice_of(p) / VEC,
                token_blocks);
}

bool too_wide(const TokenProducts& p) { return p.dim > std::numeric_limits<int>::max(); }

}  // namespace

cudaError_t token_dots(const TokenProducts& p, const Rows& vectors, float* out,
                       cudaStream_t stream) {
  if (p.batch * p.groups * p.tokens == 0) return cudaSuccess;
  if (too_wide(p)) return cudaErrorInvalidValue;
  const bool aligned = words_fit(p) && rows_aligned(vectors, slice_of(p), p.dtype);
  if (aligned && !p.sliced && takes_matrices(p)) return matrix_token_dots(p, vectors, out, stream);
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = 16 / sizeof(T);
    if (!aligned) return dots_of<T, 1, 1>(p, vectors, out, stream);
    return p.sliced || p.groups == 1 ? dots_of<T, kVec, 1>(p, vectors, out, stream)
                                     : dots_of<T, kVec, 4>(p, vectors, out, stream);
  });
}

cudaError_t weigh_tokens(const TokenProducts& p, const float* weights, void* out, bool to_float,
                         cudaStream_t stream) {
  if (p.batch * p.groups * p.dim == 0) return cudaSuccess;
  if (too_wide(p)) return cudaErrorInvalidValue;
  if (words_fit(p) && !p.sliced && takes_matrices(p)) {
    return matrix_weigh_tokens(p, weights, out, to_float, stream);
  }
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = 16 / sizeof(T);
    if (p.sliced) {
      return words_fit(p) ? weigh_of<T, kVec, 1, true, T>(p, weights, out, stream)
                          : weigh_of<T, 1, 1, true, T>(p, weights, out, stream);
    }
    return to_float ? weigh_of<T, float>(p, weights, out, stream)
                    : weigh_of<T, T>(p, weights, out, stream);
  });
}

cudaError_t pool_weights(const TokenProducts& p, const Rows& scores, bool softmax, float* weights,
                         cudaStream_t stream) {
  const int64_t rows = p.batch * p.groups;
  if (rows * p.tokens == 0) return cudaSuccess;
  return launch(pool_weights_kernel, blocks_for(rows, kWarps), kThreads, 0, stream, p,
                allowed_of(p), scores, softmax, weights);
}

cudaError_t score_gradients(const TokenProducts& p, const Rows& dweights, const float* weights,
                            bool softmax, float* ds, cudaStream_t stream) {
  const int64_t rows = p.batch * p.groups;
  if (rows * p.tokens == 0) return cudaSuccess;
  return launch(score_gradients_kernel, blocks_for(rows, kWarps), kThreads, 0, stream, p,
                allowed_of(p), dweights, weights, softmax, ds);
}

cudaError_t spread_tokens(const TokenProducts& p, const TokenSpread& first,
                          const TokenSpread& second, void* out, cudaStream_t stream) {
  if (p.batch * p.tokens * p.dim == 0) return cudaSuccess;
  const bool has_first = first.weights != nullptr;
  const bool has_second = second.weights != nullptr;
  const bool sliced = p.sliced && has_second;
  const int64_t columns = sliced ? slice_of(p) : p.dim;
  const bool aligned = rows_aligned({out, 0, 0}, p.dim, p.dtype) &&
                       (!has_first || rows_aligned(first.vectors, p.dim, p.dtype)) &&
                       (!has_second || rows_aligned(second.vectors, columns, p.dtype));
  if (aligned && !sliced && takes_matrices(p)) {
    return has_first ? matrix_spread_tokens(p, first, second, out, stream)
                     : matrix_spread_tokens(p, second, first, out, stream);
  }
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = 16 / sizeof(T);
    if (sliced) {
      return aligned ? spread_of<T, kVec, true>(p, first, second, out, stream)
                     : spread_of<T, 1, true>(p, first, second, out, stream);
    }
    return aligned ? spread_of<T, kVec, false>(p, first, second, out, stream)
                   : spread_of<T, 1, false>(p, first, second, out, stream);
  });
}

}  // namespace mimkernels::cuda

#include "cuda/device.cuh"
#include "cuda/pooling/pool.cuh"
#include "cuda/pooling/token_pool.h"
#include "cuda/pooling/token_pool_tiling.h"
#include "cuda/pooling/token_products.h"

namespace mimkernels::cuda {
namespace {

// Queries whose sums a warp holds beside each other.
constexpr int kMostQueries = 4;
// Sums that a lane holds, of all queries.
constexpr int kMostSums = 128;
// Words of a token that a lane holds.
constexpr int kMostWords = 8;
// Tokens that a warp reads at a time: two, or one where two would not fit the registers.
constexpr int kPair = 2;
template <typename T, int SUMS>
constexpr int kAtATime = sizeof(T) == 2 && SUMS > kMostSums / 2 ? 1 : kPair;
// Whether a lane's registers hold the sums of `groups` queries of `words` words beside what it
// reads.
constexpr bool sums_fit(int64_t size, int64_t words, int64_t groups) {
  return words * (16 / size) * groups <= kMostSums &&
         (size == 4 || groups == 1 || words < kMostWords);
}
constexpr int kPoolThreads = kPoolWarps * kWarp;
// Registers of a lane for the sums, for the tokens that it works on and for those it loads meanwhile.
template <typename T, int WORDS, int GROUPS>
constexpr int kPoolRegisters = WORDS * (16 / sizeof(T)) * GROUPS +
                               2 * kAtATime<T, WORDS * (16 / sizeof(T)) * GROUPS> * WORDS * 4;
// Whether the next tokens are loaded while these are used: where that leaves room for as many blocks.
template <typename T, int WORDS, int GROUPS>
constexpr bool kPrefetches = kPoolRegisters<T, WORDS, GROUPS> <= (sizeof(T) == 2 ? 160 : 96);
// Blocks of a multiprocessor that registers must leave room for.
template <typename T, int WORDS, int GROUPS>
constexpr int kPoolBlocks = !kPrefetches<T, WORDS, GROUPS>           ? 2
                            : kPoolRegisters<T, WORDS, GROUPS> <= 48 ? 5
                            : kPoolRegisters<T, WORDS, GROUPS> <= 64 ? 4
                            : kPoolRegisters<T, WORDS, GROUPS> <= 96 ? 3
                                                                     : 2;
// Blocks that fill a large device: images are split into chunks until there are as many, of no fewer
// than 32 tokens. Constants, so that the order of a sum depends on the shape alone.
constexpr int64_t kBlocksWanted = 512;
constexpr int64_t kLeastChunk = 32;

// How one pass reads an image's tokens.
struct OnePass {
  int64_t chunks = 0;  // 0: it cannot
  int64_t per_chunk = 0;
  int words = 0;  // of a token

  float* sums(float* workspace) const { return workspace; }           // [B, G, chunks, D]
  float* most(const TokenPoolFwdParams& p, float* workspace) const {  // [B, G, chunks, 2]
    return workspace + p.batch * p.groups * chunks * p.dim;
  }
  int64_t floats(const TokenPoolFwdParams& p) const {
    return p.batch * p.groups * chunks * (p.dim + 2);
  }
};

int64_t words_per_lane(int64_t words) { return ceil_div(ceil_div(words, kWarp), 2) * 2; }

OnePass one_pass_of(const TokenPoolFwdParams& p) {
  OnePass pass;
  const int64_t size = element_size(p.dtype);
  const int64_t words = p.dim * size / 16;
  const int64_t groups = p.groups == 3 ? 4 : p.groups;
  const bool fits = p.has_queries && p.pools_x && !p.sliced && p.softmax && p.groups > 0 &&
                    p.groups <= kMostQueries && words <= kMostWords * kWarp &&
                    sums_fit(size, words_per_lane(words), groups) &&
                    rows_aligned(p.x, p.dim, p.dtype) && rows_aligned(p.queries, p.dim, p.dtype);
  if (!fits || p.batch * p.tokens * p.dim == 0) {
    return pass;
  }
  const int64_t wanted = ceil_div(kBlocksWanted, p.batch);
  const int64_t length = ceil_div(p.tokens, wanted);
  const int64_t step = kPoolWarps * kPair;
  pass.per_chunk = ceil_div(length < kLeastChunk ? kLeastChunk : length, step) * step;
  pass.chunks = ceil_div(p.tokens, pass.per_chunk);
  pass.words = static_cast<int>(words);
  return pass;
}

// grid:     blocks of 128 threads; a block owns one chunk of the tokens of an image, its warps
//           every fourth pair of them; then loops
// in:       x [B, N, D], queries [B, G, D] by stride, last stride 1; mask bool [B, N] by stride, or
//           none
// out:      scores fp32 [B, G, N], -inf where a token is not allowed; sums fp32 [B, G, chunks, D],
//           of exp(score - most) * x; most fp32 [B, G, chunks, 2], the largest score and the sum of
//           exp(score - most); every element written exactly once
// numerics: fp32, online softmax; each warp's tokens in order, then the warps
// bounds:   tails and tokens that are not allowed read as zeros; offsets are int64
// cost:     x read once, PAIR * WORDS independent loads per thread, prefetched; queries, and the sums
//           of one query at a time, in shared memory; no atomics, deterministic
template <typename T, int WORDS, int GROUPS>
__global__ void __launch_bounds__(kPoolThreads, (kPoolBlocks<T, WORDS, GROUPS>))
    pool_chunk_kernel(TokenPoolFwdParams p, AllowedTokens allowed, OnePass pass, float* sums,
                      float* most) {
  constexpr int VEC = 16 / sizeof(T);
  constexpr int PAIR = kAtATime<T, WORDS * VEC * GROUPS>;
  constexpr bool PREFETCHES = kPrefetches<T, WORDS, GROUPS>;
  using W = Word<T, VEC>;
  W* const queries = reinterpret_cast<W*>(shared_memory());                        // [G, words]
  float* const parts = reinterpret_cast<float*>(queries + p.groups * pass.words);  // [4, D]
  float* const levels = parts + kPoolWarps * p.dim;                                // [4, G, 2]
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int groups = static_cast<int>(p.groups);
  for (int64_t item = blockIdx.x; item < p.batch * pass.chunks; item += gridDim.x) {
    int64_t chunk;
    const int64_t b = divide(item, pass.chunks, chunk);
    const int64_t end = min(p.tokens, (chunk + 1) * pass.per_chunk);
    for (int i = threadIdx.x; i < groups * pass.words; i += kPoolThreads) {
      const int g = i / pass.words;
      queries[i] =
          __ldg(reinterpret_cast<const W*>(row_at<T>(p.queries, b, g)) + i - g * pass.words);
    }
    __syncthreads();

    float level[GROUPS];
    float total[GROUPS] = {};
    float acc[GROUPS][WORDS][VEC] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      level[g] = kMinusInfinity;
    }
    W next[PAIR][WORDS];
    bool next_wanted[PAIR];
    const auto load = [&](int64_t n) {
#pragma unroll
      for (int i = 0; i < PAIR; ++i) {
        next_wanted[i] = n + i < end && allowed(b, n + i);
        const W* const row = reinterpret_cast<const W*>(row_at<T>(p.x, b, n + i));
#pragma unroll
        for (int c = 0; c < WORDS; ++c) {
          const int v = c * kWarp + lane;
          next[i][c] = next_wanted[i] && v < pass.words ? __ldg(row + v) : W{};
        }
      }
    };
    const int64_t first = chunk * pass.per_chunk + warp * PAIR;
    if constexpr (PREFETCHES) {
      load(first);
    }
    for (int64_t n = first; n < end; n += kPoolWarps * PAIR) {
      if constexpr (!PREFETCHES) {
        load(n);
      }
      bool wanted[PAIR];
      W x[PAIR][WORDS];
#pragma unroll
      for (int i = 0; i < PAIR; ++i) {
        wanted[i] = next_wanted[i];
#pragma unroll
        for (int c = 0; c < WORDS; ++c) {
          x[i][c] = next[i][c];
        }
      }
      if constexpr (PREFETCHES) {
        load(n + kPoolWarps * PAIR);
      }
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (g >= groups) {
          continue;
        }
        float score[PAIR] = {};
#pragma unroll
        for (int c = 0; c < WORDS; ++c) {
          const int v = c * kWarp + lane;
          const W q = v < pass.words ? queries[g * pass.words + v] : W{};
#pragma unroll
          for (int i = 0; i < PAIR; ++i) {
            score[i] = add_dot<T, VEC>(score[i], x[i][c], q);
          }
        }
        float highest = level[g];
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
          score[i] = warp_sum(score[i]);
          score[i] = wanted[i] ? score[i] * p.scale : kMinusInfinity;
          highest = fmaxf(highest, score[i]);
          if (lane == i && n + i < end) {
            p.weights[(b * p.groups + g) * p.tokens + n + i] = score[i];
          }
        }
        const float base = softmax_level(highest);
        if (highest != level[g]) {
          const float worth = expf(level[g] - base);
          total[g] *= worth;
#pragma unroll
          for (int c = 0; c < WORDS; ++c) {
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
              acc[g][c][e] *= worth;
            }
          }
          level[g] = highest;
        }
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
          const float weight = expf(score[i] - base);
          total[g] += weight;
#pragma unroll
          for (int c = 0; c < WORDS; ++c) {
            add_weighted<T, VEC>(acc[g][c], weight, x[i][c]);
          }
        }
      }
    }

    if (lane == 0) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (g < groups) {
          levels[(warp * groups + g) * 2] = level[g];
          levels[(warp * groups + g) * 2 + 1] = total[g];
        }
      }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      if (g >= groups) {
        continue;
      }
#pragma unroll
      for (int c = 0; c < WORDS; ++c) {
        const int v = c * kWarp + lane;
        if (v < pass.words) {
          float4* const to = reinterpret_cast<float4*>(parts + warp * p.dim + v * VEC);
#pragma unroll
          for (int e = 0; e < VEC; e += 4) {
            to[e / 4] =
                make_float4(acc[g][c][e], acc[g][c][e + 1], acc[g][c][e + 2], acc[g][c][e + 3]);
          }
        }
      }
      __syncthreads();
      float highest = kMinusInfinity;
#pragma unroll
      for (int w = 0; w < kPoolWarps; ++w) {
        highest = fmaxf(highest, levels[(w * groups + g) * 2]);
      }
      float worth[kPoolWarps];
      float all = 0.0f;
#pragma unroll
      for (int w = 0; w < kPoolWarps; ++w) {
        worth[w] = expf(levels[(w * groups + g) * 2] - softmax_level(highest));
        all += worth[w] * levels[(w * groups + g) * 2 + 1];
      }
      const int64_t part = (b * p.groups + g) * pass.chunks + chunk;
      for (int64_t i = threadIdx.x; i < p.dim; i += kPoolThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kPoolWarps; ++w) {
          sum = fmaf(worth[w], parts[w * p.dim + i], sum);
        }
        sums[part * p.dim + i] = sum;
      }
      if (threadIdx.x == 0) {
        most[2 * part] = highest;
        most[2 * part + 1] = all;
      }
      __syncthreads();
    }
  }
}

// grid:     (queries, images) of 256 threads; a block owns one row of out, then loops over images
// in:       sums and most of pool_chunk_kernel; mask bool [B, N] by stride, or none
// out:      out [B, G, D]; weights fp32 [B, G, N] from scores, in place; every element written
//           exactly once
// numerics: fp32, chunks in order, rounded once
// bounds:   tails are masked, weights are 0 where a token is not allowed; offsets are int64
// cost:     sums and scores read once; no shared memory, no atomics, deterministic
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    pool_combine_kernel(TokenPoolFwdParams p, AllowedTokens allowed, int64_t chunks,
                        const float* sums, const float* most) {
  const int64_t g = blockIdx.x;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int64_t row = b * p.groups + g;
    const float* const of_row = most + row * chunks * 2;
    float highest = kMinusInfinity;
    for (int64_t c = 0; c < chunks; ++c) {
      highest = fmaxf(highest, __ldg(of_row + 2 * c));
    }
    const float level = softmax_level(highest);
    float total = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) {
      total = fmaf(expf(__ldg(of_row + 2 * c) - level), __ldg(of_row + 2 * c + 1), total);
    }
    const float inverse = softmax_inverse(total);
    for (int64_t i = threadIdx.x; i < p.dim; i += kThreads) {
      float sum = 0.0f;
#pragma unroll 4
      for (int64_t c = 0; c < chunks; ++c) {
        const float worth = expf(__ldg(of_row + 2 * c) - level);
        sum = fmaf(worth, __ldg(sums + (row * chunks + c) * p.dim + i), sum);
      }
      static_cast<T*>(p.out)[row * p.dim + i] = from_float<T>(sum * inverse);
    }
    float* const weights = p.weights + row * p.tokens;
    for (int64_t n = threadIdx.x; n < p.tokens; n += kThreads) {
      weights[n] = allowed(b, n) ? expf(weights[n] - level) * inverse : 0.0f;
    }
  }
}

template <typename T, int WORDS, int GROUPS>
cudaError_t chunks_of(const TokenPoolFwdParams& p, const OnePass& pass, float* workspace,
                      cudaStream_t stream) {
  if constexpr (!sums_fit(sizeof(T), WORDS, GROUPS)) {
    return cudaErrorInvalidValue;
  } else {
    const AllowedTokens allowed = {p.mask, p.num_prefix, p.tokens};
    const int shared = pool_chunk_bytes(p.groups, p.dim, pass.words);
    const cudaError_t error = launch(
        pool_chunk_kernel<T, WORDS, GROUPS>, blocks_for(p.batch * pass.chunks, 1), kPoolThreads,
        shared, stream, p, allowed, pass, pass.sums(workspace), pass.most(p, workspace));
    if (error != cudaSuccess) {
      return error;
    }
    return launch(pool_combine_kernel<T>, blocks_for_grid(p.groups, p.batch), kThreads, 0, stream,
                  p, allowed, pass.chunks, pass.sums(workspace), pass.most(p, workspace));
  }
}

template <typename T, int WORDS>
cudaError_t chunks_of(const TokenPoolFwdParams& p, const OnePass& pass, float* workspace,
                      cudaStream_t stream) {
  if (p.groups == 1) return chunks_of<T, WORDS, 1>(p, pass, workspace, stream);
  if (p.groups == 2) return chunks_of<T, WORDS, 2>(p, pass, workspace, stream);
  return chunks_of<T, WORDS, 4>(p, pass, workspace, stream);
}

cudaError_t pool_in_one_pass(const TokenPoolFwdParams& p, const OnePass& pass, float* workspace,
                             cudaStream_t stream) {
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    switch (words_per_lane(pass.words)) {
      case 2:
        return chunks_of<T, 2>(p, pass, workspace, stream);
      case 4:
        return chunks_of<T, 4>(p, pass, workspace, stream);
      case 6:
        return chunks_of<T, 6>(p, pass, workspace, stream);
      default:
        return chunks_of<T, 8>(p, pass, workspace, stream);
    }
  });
}

}  // namespace

int64_t token_pool_fwd_workspace(const TokenPoolFwdParams& p) { return one_pass_of(p).floats(p); }

// One pass where a warp holds the sums of all queries; else scores, their softmax, and sums, of
// which the last read the values once more, from L2 where they fit.
cudaError_t token_pool_fwd(const TokenPoolFwdParams& p, float* workspace, cudaStream_t stream) {
  const OnePass pass = one_pass_of(p);
  if (pass.chunks > 0) {
    return pool_in_one_pass(p, pass, workspace, stream);
  }
  TokenProducts products;
  products.dtype = p.dtype;
  products.batch = p.batch;
  products.tokens = p.tokens;
  products.num_prefix = p.num_prefix;
  products.groups = p.groups;
  products.dim = p.dim;
  products.scale = p.scale;
  products.mask = p.mask;
  products.x = p.x;
  Rows scores = p.scores;
  if (p.has_queries) {
    const cudaError_t error = token_dots(products, p.queries, p.weights, stream);
    if (error != cudaSuccess) {
      return error;
    }
    scores = {p.weights, p.groups * p.tokens, p.tokens};
  }
  const cudaError_t error = pool_weights(products, scores, p.softmax, p.weights, stream);
  if (error != cudaSuccess) {
    return error;
  }
  products.dim = p.width;
  products.sliced = p.sliced;
  products.scale = 1.0f;
  products.x = p.values;
  return weigh_tokens(products, p.weights, p.out, false, stream);
}

}  // namespace mimkernels::cuda

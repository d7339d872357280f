// The kernel of attention_fwd for one type of elements; a source file per type, so that they
// compile in parallel.
#pragma once

#include "cuda/attention/scores.cuh"
#include "ops/attention/cuda.h"

namespace mimkernels::cuda {

// Keys whose scores a warp holds in registers.
template <typename T>
constexpr int kForwardTile = tile_tokens(sizeof(T));

// Which operands start every row on 16 bytes.
struct FwdAligned {
  bool q = false;
  bool k = false;
  bool v = false;
};

constexpr int kNoKey = 1 << 30;  // of a tile: not to be reached by adding to it

// What a lane sums for its two rows while it sees keys, relative to the maximum so far: p =
// power(t) and p t. The four lanes of a row have a quarter of the keys each.
struct RowSums {
  float level[2] = {-kInfinity, -kInfinity};
  float sum[2] = {};
  // Statistics only:
  float patch[2] = {};
  float prefix[2] = {};
  float energy[2] = {};
  float patch_energy[2] = {};
  float far[2] = {};
  float own[2] = {};
};

// Adds a lane's elements of a group to its statistics: weights p and their exponents t.
__device__ __forceinline__ void add_statistics(RowSums& sums, const AttentionFwdParams& p,
                                               const HeadPositions& positions, int first_row,
                                               int first_column, const float (&weight)[2][4],
                                               const float (&exponent)[2][4]) {
  // Calls add(half, query, key, weight, i) for every element i, of row `half`.
  const auto each = [&](auto add) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int query, key;
      locate<false>(first_row, first_column, i / 4, i % 4, query, key);
      add(i % 4 / 2, query, key, weight[i / 4][i % 4], i);
    }
  };
  const int prefix = static_cast<int>(p.num_prefix);
  if (p.stats & (kPrefixMass | kPatchMass | kPatchEntropy)) {
    each([&](int half, int, int key, float w, int) {
      sums.patch[half] += key >= prefix ? w : 0.0f;
      sums.prefix[half] += key >= prefix ? 0.0f : w;
    });
  }
  if (p.stats & (kEntropy | kPatchEntropy)) {
    each([&](int half, int, int key, float w, int i) {
      const float energy = w * fmaxf(exponent[i / 4][i % 4], kLeastExponent);
      sums.energy[half] += energy;
      sums.patch_energy[half] += key >= prefix ? energy : 0.0f;
    });
  }
  if (p.stats & kSelfMass) {
    each([&](int half, int query, int key, float w, int) {
      sums.own[half] += query == key ? w : 0.0f;
    });
  }
  if (p.stats & kDistance) {
    float d[2][4];
    load_distances<false>(d, positions, first_row, first_column);
    each([&](int half, int, int key, float w, int i) {
      sums.far[half] += key >= prefix ? w * d[i / 4][i % 4] : 0.0f;
    });
  }
}

// A number whose value the compiler cannot know, so that what is made of it stays where it is.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The first key of a tile whose score is the maximum of row `half`, where that is `higher` than
// before. Written at once, and from an address that is made anew: lanes have no registers in which
// to keep either from tile to tile.
template <int GROUPS>
__device__ __forceinline__ void write_argmax(const AttentionFwdParams& p,
                                             const float (&score)[GROUPS][2][4], int groups,
                                             int half, float level, bool higher, int head,
                                             int first_row, int first_key) {
  int first = kNoKey;
#pragma unroll
  for (int j = GROUPS - 1; j >= 0; --j) {
    if (j >= groups) {
      continue;
    }
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      if (i % 4 / 2 == half && score[j][i / 4][i % 4] == level) {
        first = j * kStrip + i / 4 * 8 + i % 2;  // of the lane's, ascending
      }
    }
  }
  const int lane = opaque(threadIdx.x) % kWarp;
  first = min_quad(first + lane % 4 * 2);
  const AttentionScores& s = p.scores;
  const int query = first_row + lane / 4 + half * 8;
  if (higher && lane % 4 == 0 && query < s.queries) {
    const int64_t plane =
        __popc(static_cast<unsigned>(opaque(static_cast<int>(p.stats)) & (kArgmax - 1)));
    p.rows[(plane * s.batch * s.heads + opaque(head)) * s.queries + query] =
        static_cast<float>(first_key + first);
  }
}

// Everything that was summed, relative to the new maxima.
template <bool STATS, int TILES>
__device__ __forceinline__ void rescale(RowSums& sums, float (&acc)[TILES][4], int half,
                                        float shrink, float shift) {
  if constexpr (STATS) {
    sums.energy[half] = (sums.energy[half] + sums.sum[half] * shift) * shrink;
    sums.patch_energy[half] = (sums.patch_energy[half] + sums.patch[half] * shift) * shrink;
    sums.patch[half] *= shrink;
    sums.prefix[half] *= shrink;
    sums.far[half] *= shrink;
    sums.own[half] *= shrink;
  }
  sums.sum[half] *= shrink;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    acc[n][2 * half] *= shrink;
    acc[n][2 * half + 1] *= shrink;
  }
}

// What is written of row `half`, from the sums of its four lanes, by the first of them.
template <typename T, bool STATS>
__device__ __forceinline__ void write_row(const AttentionFwdParams& p, const RowSums& sums,
                                          int half, float total, float inverse, float scale,
                                          int head, int query) {
  const AttentionScores& s = p.scores;
  const bool writes = threadIdx.x % 4 == 0 && query < s.queries;
  const int64_t place = head * s.queries + query;
  const bool empty = total == 0.0f;
  const float level = sums.level[half];
  const float log_total = logf(total);
  if (writes) {
    // Scaled in one rounding with what is added, as subtract_lse does it.
    const float lse = level == kInfinity ? level : fmaf(level, scale, log_total);
    p.lse[place] = lse;
    p.lse_low[place] = fabsf(lse) < kInfinity ? fmaf(level, scale, -lse) + log_total : 0.0f;
  }
  if constexpr (STATS) {
    const int64_t plane = s.batch * s.heads * s.queries;
    float* row = p.rows + place;
    const auto put = [&](float value) {
      if (writes) {
        *row = value;
      }
      row += plane;
    };
    const float patch = add_quad(sums.patch[half]);
    if (p.stats & kEntropy) {
      const float energy = add_quad(sums.energy[half]);
      put(empty ? 0.0f : log_total - energy * inverse * kOneUnit<T>);
    }
    if (p.stats & kPrefixMass) {
      put(add_quad(sums.prefix[half]) * inverse);
    }
    if (p.stats & kSelfMass) {
      put(add_quad(sums.own[half]) * inverse);
    }
    if (p.stats & kDistance) {
      const float far = add_quad(sums.far[half]);
      put((query >= p.num_prefix ? far : 0.0f) * inverse);
    }
    if (p.stats & kPatchEntropy) {
      const float energy = add_quad(sums.patch_energy[half]);
      put(patch * inverse < kLeastPatchMass ? 0.0f : logf(patch) - energy / patch * kOneUnit<T>);
    }
    if (p.stats & kPeak) {
      put(inverse);
    }
    if (p.stats & kPatchMass) {
      put(patch * inverse);
    }
    // The maximum passes NaN over, the sum does not; nor infinity.
    const bool ordered = total == total || level == kInfinity;
    if (p.stats & kMaxScore) {
      put(ordered ? level * scale : total);
    }
    if ((p.stats & kArgmax) && (empty || !ordered)) {
      put(-1.0f);
    }
  }
}

// grid:     row blocks of 16 queries per warp, fastest, times B * H; short heads share a block
// in:       q, k, v by stride, features contiguous; bias by stride (0 where broadcast), table
//           and index, factors of cosines, key mask, positions fp32, each or none
// out:      out [B, Nq, H, D], lse and lse_low fp32 [B, H, Nq], rows fp32 [S, B, H, Nq] in the
//           order of the bits of stats; contiguous, every element written once, argmax with every
//           higher score
// numerics: scores, maxima and sums in fp32; p = power((score - maximum) * factor), rounded to the
//           type of v for its product; FOLD (no bias, positive
//           scale): the scale is in factor. Statistics are sums relative to the row's maximum
// bounds:   keys beyond the last and masked keys have score -inf, their rows are zeros; query
//           tails are not stored; offsets into tensors are int64
// cost:     q read once, k and v once per row block, two tiles of keys in shared memory; up to
//           two tiles of keys (128; fp32: 64) nothing is read twice; no atomics, deterministic
template <typename T, int DIM, bool STATS>
__global__ void __launch_bounds__(forward_warps(DIM, sizeof(T), STATS) * kWarp,
                                  forward_blocks(DIM, sizeof(T), STATS))
    attention_fwd_kernel(AttentionFwdParams p, StripTiling tiling, FwdAligned aligned) {
  constexpr int kGroups = kForwardTile<T> / kStrip;
  constexpr int kSteps = DIM / kStep<T>;
  constexpr int kStride = row_stride<T>(DIM);
  constexpr int kChunks = DIM / kChunk<T>;
  const AttentionScores& s = p.scores;
  const int images = static_cast<int>(s.batch);
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int lane = threadIdx.x % kWarp;
  const WarpPlace place(tiling, images * heads, queries);
  const int b = place.busy ? place.head / heads : 0;
  const int h = place.busy ? place.head % heads : 0;
  const HeadTerms terms(s, b, h);
  const HeadPositions positions(p.positions, b, keys);
  const bool fold = terms.folds;
  const float factor = (fold ? s.scale : 1.0f) * kUnitsOfOne<T>;

  T* const shared = reinterpret_cast<T*>(shared_memory());
  T* const strip = shared + threadIdx.x / kWarp * kStrip * kStride;
  T* const slots = shared + blockDim.x / kWarp * kStrip * kStride;
  const int matrix = tiling.heads * tiling.tile * kStride;
  const auto start = [&](int tile) {
    T* const to = slots + tile % 2 * 2 * matrix;
    load_tile(to, kStride, kChunks, s.k, images, heads, tiling, place.first_head, tile, keys, dim,
              aligned.k);
    load_tile(to + matrix, kStride, kChunks, p.v, images, heads, tiling, place.first_head, tile,
              keys, dim, aligned.v);
    copy_async_commit();
  };
  load_strip(strip, kStride, kChunks, s.q, heads, place, queries, dim, aligned.q);
  copy_async_commit();  // with no token on the other side, no tile would

  RowSums sums;
  float acc[DIM / 8][4] = {};
  constexpr bool kKeep = !kExact<T> && (DIM != 64 || STATS);
  uint32_t left[kKeep ? kSteps : 1][4];  // the queries, where they fit registers
  for (int tile = -1; tile < tiling.tiles; ++tile) {
    if (tile >= 0) {
      copy_async_wait<0>();
      __syncthreads();
    }
    if (tile + 1 < tiling.tiles) {
      start(tile + 1);
    }
    if (tile < 0 || !place.busy) {
      continue;
    }
    if constexpr (kKeep) {
      if (tile == 0) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          load_matrices(left[step], left_row(strip, kStride) + step * kStep<T>);
        }
      }
    }
    const T* const k_rows =
        slots + tile % 2 * 2 * matrix + place.local_head * tiling.tile * kStride;
    const T* const v_rows = k_rows + matrix;
    const int first_key = tile * tiling.tile;
    const int groups = (min(keys - first_key, tiling.tile) + kStrip - 1) / kStrip;
    const bool checks = terms.has_mask || first_key + groups * kStrip > keys;

    float score[kGroups][2][4];
    float top[2] = {sums.level[0], sums.level[1]};
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (j >= groups) {
        continue;
      }
      GroupTerms group;
      if (!fold || checks) {
        group = load_terms<T, false>(terms, place.first, first_key + j * kStrip);
      }
      const T* const rows = k_rows + j * kStrip * kStride;
      if constexpr (kKeep) {
        clear(score[j]);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          multiply_step<T>(score[j], left[step], right_row(rows, kStride) + step * kStep<T>);
        }
      } else {
        multiply_rows<T>(score[j], strip, rows, kStride, kSteps);
      }
      make_cosines<false>(score[j], terms, place.first, first_key + j * kStrip);
      finish_scores(score[j], group, fold, checks, s.scale);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        top[i % 4 / 2] = fmaxf(top[i % 4 / 2], score[j][i / 4][i % 4]);
      }
    }

    float base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float level = max_quad(top[half]);
      if constexpr (STATS) {
        if (p.stats & kArgmax) {
          write_argmax<kGroups>(p, score, groups, half, level, level > sums.level[half], place.head,
                                place.first, first_key);
        }
      }
      base[half] = level == -kInfinity ? 0.0f : level;
      if (tile > 0) {
        const float shift = fmaxf((sums.level[half] - base[half]) * factor, kLeastExponent);
        rescale<STATS>(sums, acc, half, power<T>(shift), shift);
      }
      sums.level[half] = level;
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (j >= groups) {
        continue;
      }
      float exponent[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i % 4 / 2;
        float& x = score[j][i / 4][i % 4];
        float& t = exponent[i / 4][i % 4];
        t = (x - base[half]) * factor;
        x = power<T>(t);
        sums.sum[half] += x;
      }
      if constexpr (STATS) {
        add_statistics(sums, p, positions, place.first, first_key + j * kStrip, score[j], exponent);
      }
      add_weighted<T>(acc, score[j], v_rows + j * kStrip * kStride, kStride);
    }
  }
  copy_async_wait<0>();
  if (!place.busy) {
    return;
  }

  // A row that may attend nothing has total 0; any other at least 1, from its maximum.
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = add_quad(sums.sum[half]);
    inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
    write_row<T, STATS>(p, sums, half, total, inverse[half], fold ? s.scale : 1.0f, place.head,
                        place.first + lane / 4 + 8 * half);
  }
  T* const out = static_cast<T*>(p.out) + ((b * s.queries + place.first) * s.heads + h) * s.dim;
  store_strip(acc, inverse[0], inverse[1], strip, kStride, out, s.heads * s.dim,
              queries - place.first, dim);
}

template <typename T, int DIM, bool STATS>
cudaError_t launch_attention_fwd(const AttentionFwdParams& p, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  const int all_heads = static_cast<int>(s.batch * s.heads);
  const StripTiling tiling = forward_tiling(s.queries, s.keys, DIM, sizeof(T), STATS);
  const FwdAligned aligned = {aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)),
                              aligned_rows(p.v, sizeof(T))};
  return launch(attention_fwd_kernel<T, DIM, STATS>, dim3(tiling.blocks(all_heads)),
                tiling.warps() * kWarp, tiling.shared_bytes, stream, p, tiling, aligned);
}

template <typename T, bool STATS>
cudaError_t choose_dim(const AttentionFwdParams& p, cudaStream_t stream) {
  const int64_t dim = p.scores.dim;
  if (dim <= 32) return launch_attention_fwd<T, 32, STATS>(p, stream);
  if (dim <= 64) return launch_attention_fwd<T, 64, STATS>(p, stream);
  if (dim <= 96) return launch_attention_fwd<T, 96, STATS>(p, stream);
  return launch_attention_fwd<T, 128, STATS>(p, stream);
}

template <typename T>
cudaError_t attention_fwd_of(const AttentionFwdParams& p, cudaStream_t stream) {
  return p.stats == 0 ? choose_dim<T, false>(p, stream) : choose_dim<T, true>(p, stream);
}

}  // namespace mimkernels::cuda

// The kernel of attention_fwd for 16-bit elements: queries stay in registers, and a warp loads keys
// and values once for all its strips.
#pragma once

#include <cfloat>
#include <type_traits>

#include "cuda/attention/strips.cuh"
#include "ops/attention/cuda/fwd.cuh"

namespace mimkernels::cuda {

// What the launcher says of a call.
struct StripsHow {
  FwdAligned aligned;
  bool fold = false;    // nothing is added to products and the scale is positive: it is in `factor`
  bool plain = false;   // and no key is masked, nor are products of vectors of length 1
  float factor = 1.0f;  // makes exponents of differences of scores
};

// -inf for the keys of a group beyond the first `count`.
__device__ __forceinline__ void hide_beyond(float (&score)[2][4], int count) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i / 4 * 8 + i % 2 >= count) {
      score[i / 4][i % 4] = -kInfinity;
    }
  }
}

// Adds to both halves of a lane's rows what value(i) is for the elements i of a group.
template <typename Value>
__device__ __forceinline__ void add_elements(float (&sums)[2], Value value) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[half] +=
        (value(2 * half) + value(2 * half + 1)) + (value(4 + 2 * half) + value(4 + 2 * half + 1));
  }
}

// Adds a group to its statistics: weights and their exponents t; `points` as point_distances takes
// them.
__device__ __forceinline__ void add_group(RowSums& sums, const AttentionFwdParams& p,
                                          const float2* points, int tokens, int planes,
                                          int first_row, int first_key, const float (&weight)[2][4],
                                          const float (&exponent)[2][4]) {
  const auto w = [&](int i) { return weight[i / 4][i % 4]; };
  float of_patches[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    of_patches[i] = w(i);
  }
  const int prefix = static_cast<int>(p.num_prefix);
  if (first_key < prefix) {
    const int column = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      of_patches[i] = column + i / 4 * 8 + i % 2 < prefix ? 0.0f : w(i);
    }
    add_elements(sums.prefix, [&](int i) { return w(i) - of_patches[i]; });
  }
  if (p.stats & (kPatchMass | kPatchEntropy)) {
    add_elements(sums.patch, [&](int i) { return of_patches[i]; });
  }
  if (p.stats & (kEntropy | kPatchEntropy)) {
    const auto t = [&](int i) { return fmaxf(exponent[i / 4][i % 4], kLeastExponent); };
    add_elements(sums.energy, [&](int i) { return w(i) * t(i); });
    add_elements(sums.patch_energy, [&](int i) { return of_patches[i] * t(i); });
  }
  if ((p.stats & kSelfMass) && first_key == first_row) {
    add_elements(sums.own, [&](int i) {
      int query, key;
      locate<false>(first_row, first_key, i / 4, i % 4, query, key);
      return query == key ? w(i) : 0.0f;
    });
  }
  if ((p.stats & kDistance) && planes > 0) {
    float d[2][4];
    point_distances(d, points, tokens, planes, static_cast<int>(p.scores.keys) - 1, first_row,
                    first_key);
    add_elements(sums.far, [&](int i) { return of_patches[i] * d[i / 4][i % 4]; });
  }
}

// grid:     row blocks of 16 or 32 queries per warp, fastest, times B * H; short heads share a block
// in:       as attention_fwd_kernel
// out:      as attention_fwd_kernel
// numerics: as attention_fwd_kernel; a group's weights are summed before they are added to a row's,
//           distances are approximate square roots (relative error 2^-23)
// bounds:   as attention_fwd_kernel; keys are checked in blocks that are not whole, or masked
// cost:     q read once and kept as fragments; k and v once per row block, two tiles of 64 keys in
//           shared memory, and from there once for 32 queries (more than 64 features: 16); for 16
//           queries by 16 keys of 64 features 4 loads of matrices and 16 products. No atomics,
//           deterministic
template <typename T, int DIM, bool FULL>
__global__ void __launch_bounds__(kStripWarps* kWarp, strips_blocks(DIM, FULL))
    attention_fwd_strips_kernel(AttentionFwdParams p, StripTiling tiling, StripsHow how) {
  constexpr int kStrips = kForwardStrips<DIM>;
  constexpr int kGroups = 4 / kStrips;  // whose scores a warp holds in registers
  constexpr int kBlock = kGroups * kStrip;
  constexpr int kSteps = DIM / kStep<T>;
  constexpr int kStride = row_stride<T>(DIM);
  constexpr int kChunks = DIM / kChunk<T>;
  const AttentionScores& s = p.scores;
  const int images = static_cast<int>(s.batch);
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const WarpPlace place(tiling, images * heads, queries, kStrips * kStrip);
  const int b = place.busy ? place.head / heads : 0;
  const int h = place.busy ? place.head % heads : 0;
  const bool fold = !FULL || how.fold;
  const bool plain = !FULL || how.plain;

  // Two tiles, of which the second is first the place of the queries, and last that of the output.
  T* const slots = reinterpret_cast<T*>(shared_memory());
  const int matrix = tiling.heads * tiling.tile * kStride;
  T* const own = slots + 2 * matrix + threadIdx.x / kWarp * kStrips * kStrip * kStride;
  // The place of the tile that begins with this key; where there are two, they are of kForwardTile.
  const auto slot_of = [&](int key) { return slots + key / kForwardTile<T> % 2 * 2 * matrix; };
  const auto start = [&](int first, int image, int head) {
    T* to = slot_of(first);
    for (int i = 0; i < tiling.heads && image < images; ++i) {
      load_rows_of<kChunks>(to, kStride, head_at<T>(s.k, image, head, first), s.k.stride_token,
                            tiling.tile, keys - first, dim, how.aligned.k,
                            static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
      load_rows_of<kChunks>(to + matrix, kStride, head_at<T>(p.v, image, head, first),
                            p.v.stride_token, tiling.tile, keys - first, dim, how.aligned.v,
                            static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
      to += tiling.tile * kStride;
      if (++head == heads) {
        head = 0;
        ++image;
      }
    }
    copy_async_commit();
  };
  if (place.busy) {
    load_rows_of<kChunks>(own, kStride, head_at<T>(s.q, b, h, place.first), s.q.stride_token,
                          kStrips * kStrip, queries - place.first, dim, how.aligned.q,
                          static_cast<int>(threadIdx.x) % kWarp, kWarp);
  }
  int2* const first_head = reinterpret_cast<int2*>(shared_memory() + tiling.head_at);
  if (tiling.tiles > 0) {
    const int image = place.first_head / heads;
    const int head = place.first_head - image * heads;
    start(0, image, head);
    if (threadIdx.x == 0) {
      *first_head = make_int2(image, head);  // no register is left in which to keep it
    }
  }
  // Where tokens lie, by head, pair of coordinates and token.
  const float2* points = nullptr;
  if constexpr (FULL) {
    const int count = tiling.planes * tiling.padded;
    float2* const all = reinterpret_cast<float2*>(shared_memory() + tiling.points_at);
    points = all + place.local_head * count;
    for (int i = 0; i < tiling.heads && count > 0; ++i) {
      const int head = min(place.first_head + i, images * heads - 1);
      const HeadPositions positions(p.positions, head / heads, keys);
      for (int plane = 0; plane < tiling.planes; ++plane) {
        for (int token = threadIdx.x; token < tiling.padded; token += blockDim.x) {
          const int d = 2 * plane;
          all[i * count + plane * tiling.padded + token] =
              make_float2(d < positions.dims ? positions.at(token, d) : 0.0f,
                          d + 1 < positions.dims ? positions.at(token, d + 1) : 0.0f);
        }
      }
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  uint32_t left[kStrips][kSteps][4];
  if (place.busy) {
    load_left(left, own, kStride);
  }
  if (tiling.tiles > 1) {
    __syncthreads();  // the second tile takes the place of the queries
  }

  RowSums sums[kStrips];
  if constexpr (!FULL) {
    // Finite, so that it can be subtracted from anything; what may be as low are biases alone.
#pragma unroll
    for (int n = 0; n < 2 * kStrips; ++n) {
      sums[n / 2].level[n % 2] = -FLT_MAX;
    }
  }
  float acc[kStrips][DIM / 8][4] = {};

  const int lane = threadIdx.x % kWarp;
  const int to_values = matrix + left_offset<T>(lane, kStride) - right_offset<T>(lane, kStride);

  // The next block of `count` keys of the tile, which ends at `end`; k_row is an address of
  // right_row. WHOLE: all are there, nothing but their products are scores.
  const auto visit = [&](auto whole, const T* k_row, int end, int count) {
    constexpr bool WHOLE = decltype(whole)::value;
    const int first_key = end - count;
    const int groups = WHOLE ? kGroups : min(kGroups, (count + kStrip - 1) / kStrip);
    float score[kStrips][kGroups][2][4];
    multiply_strips<T>(score, left, k_row, kStride, groups);
    float base[kStrips][2];
    float level[kStrips][2];
    bool rises = false;
#pragma unroll
    for (int n = 0; n < kStrips; ++n) {
      const int first_row = place.first + n * kStrip;
      float top[2] = {sums[n].level[0], sums[n].level[1]};
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (j >= groups) {
          continue;
        }
        if constexpr (!WHOLE && !FULL) {
          hide_beyond(score[n][j], count - j * kStrip);
        }
        if constexpr (!WHOLE && FULL) {
          const int first = first_key + j * kStrip;
          const HeadTerms terms(s, b, h);
          const GroupTerms group = load_terms<T, false>(terms, first_row, first);
          make_cosines<false>(score[n][j], terms, first_row, first);
          finish_scores(score[n][j], group, fold, true, s.scale);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          top[i % 4 / 2] = fmaxf(top[i % 4 / 2], score[n][j][i / 4][i % 4]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        level[n][half] = max_quad(top[half]);
        base[n][half] = FULL && level[n][half] == -kInfinity ? 0.0f : level[n][half];
        rises |= level[n][half] > sums[n].level[half];
      }
    }
    // Where no maximum rises, nothing that was summed changes.
    if (__any_sync(kWarpMask, rises)) {
#pragma unroll
      for (int n = 0; n < kStrips; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float last = sums[n].level[half];
          if constexpr (FULL) {
            if (p.stats & kArgmax) {
              write_argmax<kGroups>(p, score[n], groups, half, level[n][half],
                                    level[n][half] > last, place.head, place.first + n * kStrip,
                                    first_key);
            }
          }
          const float shift = fmaxf((last - base[n][half]) * how.factor, kLeastExponent);
          rescale<FULL>(sums[n], acc[n], half, power<T>(shift), shift);
          sums[n].level[half] = level[n][half];
        }
      }
    }
    const T* const v_row = k_row + to_values;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (j >= groups) {
        continue;
      }
      uint32_t weights[kStrips][4];
#pragma unroll
      for (int n = 0; n < kStrips; ++n) {
        float exponent[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& x = score[n][j][i / 4][i % 4];
          float& t = exponent[i / 4][i % 4];
          t = (x - base[n][i % 4 / 2]) * how.factor;
          x = power<T>(t);
        }
        add_elements(sums[n].sum, [&](int i) { return score[n][j][i / 4][i % 4]; });
        if constexpr (FULL) {
          add_group(sums[n], p, points, tiling.padded, tiling.planes, place.first + n * kStrip,
                    first_key + j * kStrip, score[n][j], exponent);
        }
        pack_group<T>(weights[n], score[n][j]);
      }
      add_weighted_strips(acc, weights, v_row + j * kStrip * kStride);
    }
  };

  const T* k_row = right_row(slots + place.local_head * tiling.tile * kStride, kStride);
  for (int first_key = 0; first_key < keys; first_key += tiling.tile) {
    if (first_key > 0) {
      copy_async_wait<0>();
      __syncthreads();
    }
    if (first_key + tiling.tile < keys) {
      start(first_key + tiling.tile, first_head->x, first_head->y);
    }
    const int end = min(keys, first_key + tiling.tile);
    int count = place.busy ? end - first_key : 0;
#pragma unroll 1
    for (; plain && count >= kBlock; count -= kBlock, k_row += kBlock * kStride) {
      visit(std::true_type{}, k_row, end, count);
    }
#pragma unroll 1
    for (; count > 0; count -= kBlock, k_row += kBlock * kStride) {
      visit(std::false_type{}, k_row, end, count);
    }
    // To the other slot; with one tile there is none.
    k_row += (first_key / kForwardTile<T> % 2 == 0 ? 2 : -2) * matrix - kForwardTile<T> * kStride;
  }
  if (tiling.tiles > 1) {
    __syncthreads();  // the output takes the place of the second tile
  }
  if (!place.busy) {
    return;
  }

  // Made anew: there are no registers in which to keep it.
  const WarpPlace end(tiling, images * heads, queries, kStrips * kStrip, opaque(0));
  const int64_t row = (end.head / heads * s.queries + end.first) * heads + end.head % heads;
  T* const out = static_cast<T*>(p.out) + row * s.dim;
  T* const staged = slots + 2 * matrix + end.warp * kStrips * kStrip * kStride;
  // A row that may attend nothing has total 0; any other at least 1, from its maximum.
#pragma unroll
  for (int n = 0; n < kStrips; ++n) {
    const int first = end.first + n * kStrip;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = add_quad(sums[n].sum[half]);
      inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
      write_row<T, FULL>(p, sums[n], half, total, inverse[half], fold ? s.scale : 1.0f, end.head,
                         first + end.lane / 4 + 8 * half);
    }
    T* const strip = staged + n * kStrip * kStride;
    stage_strip(acc[n], inverse[0], inverse[1], strip, kStride);
    store_rows<kChunks, kStrip>(out + n * kStrip * s.heads * s.dim, s.heads * s.dim, strip, kStride,
                                queries - first, dim);
  }
}

template <typename T, int DIM, bool FULL>
cudaError_t launch_attention_fwd_strips(const AttentionFwdParams& p, const StripsHow& how,
                                        cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  const StripTiling tiling = strips_tiling(s, p.positions, DIM, sizeof(T), FULL);
  return launch(attention_fwd_strips_kernel<T, DIM, FULL>,
                dim3(tiling.blocks(static_cast<int>(s.batch * s.heads))), tiling.warps() * kWarp,
                tiling.shared_bytes, stream, p, tiling, how);
}

template <typename T, bool FULL>
cudaError_t choose_strips_dim(const AttentionFwdParams& p, const StripsHow& how,
                              cudaStream_t stream) {
  const int64_t dim = p.scores.dim;
  if (dim <= 32) return launch_attention_fwd_strips<T, 32, FULL>(p, how, stream);
  if (dim <= 64) return launch_attention_fwd_strips<T, 64, FULL>(p, how, stream);
  if (dim <= 96) return launch_attention_fwd_strips<T, 96, FULL>(p, how, stream);
  return launch_attention_fwd_strips<T, 128, FULL>(p, how, stream);
}

template <typename T>
cudaError_t attention_fwd_strips(const AttentionFwdParams& p, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  StripsHow how;
  how.aligned = {aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)),
                 aligned_rows(p.v, sizeof(T))};
  how.fold = !s.bias.given && !s.table.given && s.scale > 0.0f;
  how.plain = how.fold && !s.key_mask.given && !s.cosine.given;
  how.factor = (how.fold ? s.scale : 1.0f) * kUnitsOfOne<T>;
  return how.plain && p.stats == 0 ? choose_strips_dim<T, false>(p, how, stream)
                                   : choose_strips_dim<T, true>(p, how, stream);
}

}  // namespace mimkernels::cuda

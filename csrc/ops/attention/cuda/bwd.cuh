// The kernel of attention_bwd for one type of elements; a source file per type, so that they
// compile in parallel.
#pragma once

#include "ops/attention/cuda.h"
#include "ops/attention/cuda/gradient.cuh"

namespace mimkernels::cuda {

// Which operands start every row on 16 bytes.
struct BwdAligned {
  bool q = false;
  bool k = false;
  bool v = false;
  bool out = false;
  bool dout = false;
};

// What a launch does: one side, or both one after the other.
struct BwdSides {
  bool queries = false;
  bool keys = false;
  bool dbias = false;      // with the queries
  bool has_delta = false;  // of queries, else it is made
};

// dout . out of a lane's two queries of the strip, dout in shared memory.
template <typename T>
__device__ __forceinline__ void strip_delta(float (&delta)[2], const T* dout, int stride,
                                            const T* out, int64_t out_stride, int rows, int dim,
                                            bool aligned) {
  const int lane = threadIdx.x % kWarp;
  const int row = lane / 2;
  float sum = 0.0f;
  if (row < rows) {
    for (int chunk = lane % 2; chunk * kChunk<T> < dim; chunk += 2) {
      const T* const from = out + row * out_stride + chunk * kChunk<T>;
      T elements[kChunk<T>];
      load_chunk(elements, from, aligned);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        sum =
            fmaf(to_float(elements[e]), to_float(dout[row * stride + chunk * kChunk<T> + e]), sum);
      }
    }
  }
  sum += __shfl_xor_sync(kWarpMask, sum, 1);
  delta[0] = __shfl_sync(kWarpMask, sum, lane / 4 * 2);
  delta[1] = __shfl_sync(kWarpMask, sum, lane / 4 * 2 + 16);
}

// A strip of 16 tokens of one side, for every warp, against all tokens of the other: dQ (and delta,
// and dbias where nothing shares it) of queries, or dK and dV of keys.
template <typename T, int DIM, bool KEYS>
__device__ __forceinline__ void visit_side(const AttentionBwdParams& p, const StripTiling& tiling,
                                           const BwdAligned& aligned, const BwdSides& sides,
                                           float* delta) {
  constexpr int kSteps = DIM / kStep<T>;
  constexpr int kStride = row_stride<T>(DIM);
  constexpr int kChunks = DIM / kChunk<T>;
  const AttentionScores& s = p.scores;
  const int images = static_cast<int>(s.batch);
  const int heads = static_cast<int>(s.heads);
  const int dim = static_cast<int>(s.dim);
  const int own_tokens = static_cast<int>(KEYS ? s.keys : s.queries);
  const int other_tokens = static_cast<int>(KEYS ? s.queries : s.keys);
  const HeadRows& own0 = KEYS ? s.k : s.q;
  const HeadRows& own1 = KEYS ? p.v : p.dout;
  const HeadRows& other0 = KEYS ? s.q : s.k;
  const HeadRows& other1 = KEYS ? p.dout : p.v;
  const bool own0_aligned = KEYS ? aligned.k : aligned.q;
  const bool own1_aligned = KEYS ? aligned.v : aligned.dout;
  const bool other0_aligned = KEYS ? aligned.q : aligned.k;
  const bool other1_aligned = KEYS ? aligned.dout : aligned.v;
  const int lane = threadIdx.x % kWarp;
  const WarpPlace place(tiling, images * heads, own_tokens);
  const int b = place.busy ? place.head / heads : 0;
  const int h = place.busy ? place.head % heads : 0;
  const HeadTerms terms(s, b, h);
  const HeadPositions positions(p.positions, b, static_cast<int>(s.keys));

  T* const shared = reinterpret_cast<T*>(shared_memory());
  T* const strip0 = shared + threadIdx.x / kWarp * 2 * kStrip * kStride;
  T* const strip1 = strip0 + kStrip * kStride;
  T* const slots = shared + blockDim.x / kWarp * 2 * kStrip * kStride;
  const int matrix = tiling.heads * tiling.tile * kStride;
  const auto start = [&](int tile) {
    T* const to = slots + tile % 2 * 2 * matrix;
    load_tile(to, kStride, kChunks, other0, images, heads, tiling, place.first_head, tile,
              other_tokens, dim, other0_aligned);
    load_tile(to + matrix, kStride, kChunks, other1, images, heads, tiling, place.first_head, tile,
              other_tokens, dim, other1_aligned);
    copy_async_commit();
  };
  load_strip(strip0, kStride, kChunks, own0, heads, place, own_tokens, dim, own0_aligned);
  load_strip(strip1, kStride, kChunks, own1, heads, place, own_tokens, dim, own1_aligned);
  copy_async_commit();  // with no token on the other side, no tile would

  float acc0[DIM / 8][4] = {};             // dQ, or dK
  float acc1[KEYS ? DIM / 8 : 2][4] = {};  // dV
  Level level[kQueries<KEYS>];
  float row_delta[kQueries<KEYS>];
  float delta_error[2] = {};  // this lane's share
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
    if constexpr (!KEYS) {
      if (tile == 0) {
        if (!sides.has_delta) {
          const T* const out = head_at<T>(p.out, b, h, place.first);
          strip_delta<T>(row_delta, strip1, kStride, out, p.out.stride_token,
                         own_tokens - place.first, dim, aligned.out);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int query = query_token<KEYS>(place.first, 0, n);
          level[n] = load_level<T>(p.lse, p.lse_low, place.head, own_tokens, query);
          if (sides.has_delta) {
            row_delta[n] = query < own_tokens ? delta[place.head * s.queries + query] : 0.0f;
          }
        }
      }
    }
    const T* const rows0 = slots + tile % 2 * 2 * matrix + place.local_head * tiling.tile * kStride;
    const T* const rows1 = rows0 + matrix;
    const int groups = (min(other_tokens - tile * tiling.tile, tiling.tile) + kStrip - 1) / kStrip;
#pragma unroll 1
    for (int j = 0; j < groups; ++j) {
      const int first = tile * tiling.tile + j * kStrip;
      const int row = j * kStrip * kStride;
      const GroupTerms group = load_terms<T, KEYS>(terms, place.first, first);
      if constexpr (KEYS) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int query = query_token<KEYS>(0, first, n);
          level[n] = load_level<T>(p.lse, p.lse_low, place.head, other_tokens, query);
          row_delta[n] = query < other_tokens ? delta[place.head * s.queries + query] : 0.0f;
        }
      }
      float score[2][4];
      float ds[2][4];
      multiply_rows<T>(score, strip0, rows0 + row, kStride, kSteps);
      multiply_rows<T>(ds, strip1, rows1 + row, kStride, kSteps);
      make_cosines<KEYS>(score, terms, place.first, first);
      score_gradient<T, KEYS>(score, ds, delta_error, p, group, level, row_delta, positions,
                              place.head, place.first, first);
      if constexpr (KEYS) {
        add_weighted<T>(acc1, score, rows1 + row, kStride);
      } else if (sides.dbias) {
        store_dbias<T>(p.dbias, s.bias.dtype == DType::kFloat32, s, place.head * s.queries * s.keys,
                       place.first, first, ds);
      }
      weigh_columns<T, KEYS>(ds, terms, place.first, first);
      add_weighted<T>(acc0, ds, rows0 + row, kStride);
    }
  }
  copy_async_wait<0>();
  if (!place.busy) {
    return;
  }
  if constexpr (!KEYS) {
    // With no keys there is no delta, nor any key to read it.
#pragma unroll
    for (int n = 0; n < 2 && tiling.tiles > 0 && !sides.has_delta; ++n) {
      const float exact = row_delta[n] + add_quad(delta_error[n]);
      const int query = query_token<KEYS>(place.first, 0, n);
      if (lane % 4 == 0 && query < own_tokens) {
        delta[place.head * s.queries + query] = exact;
      }
    }
  }
  const int64_t offset = (b * int64_t{own_tokens} + place.first) * p.stride_grad + h * s.dim;
  const int rows = own_tokens - place.first;
  float factor = static_cast<float>(s.scale);
  if (s.cosine.given) {
    const GroupFactors<KEYS> factors(terms, place.first, 0);
    make_tangents<T>(acc0, strip0, kStride, factors.rows);
    factor = 1.0f;
  }
  store_strip(acc0, factor, factor, strip0, kStride, static_cast<T*>(KEYS ? p.dk : p.dq) + offset,
              p.stride_grad, rows, dim);
  if constexpr (KEYS) {
    store_strip(acc1, 1.0f, 1.0f, strip1, kStride, static_cast<T*>(p.dv) + offset, p.stride_grad,
                rows, dim);
  }
}

// grid:     row blocks of 16 tokens per warp, fastest, times B * H; short heads share a block. A
//           launch does the strips of queries, those of keys, or of a head's both sides in turn
// in:       q, k, v, out, dout by stride, features contiguous; lse, lse_low and coef contiguous,
//           coef or none; bias by stride (0 where broadcast), table and index, factors of cosines,
//           key mask, positions fp32, each or none
// out:      dq [B, Nq, H, D], dk, dv [B, Nk, H, D], apart or the parts of [B, N, 3, H, D]; delta
//           fp32 [B, H, Nq] = dout . out before out is rounded, which keys read; dbias where
//           nothing shares it; contiguous, every element written once
// numerics: P from lse and lse_low, everything in fp32; P and dS rounded to the type of v for
//           their products
// bounds:   keys beyond the last and masked keys have P = 0, and so have queries beyond the last;
//           tails are not stored; offsets into tensors are int64
// cost:     seven products, so that every sum stays in one warp; own rows read once, the other
//           side's once per row block, two tiles in shared memory; no atomics, deterministic
template <typename T, int DIM>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, backward_blocks(DIM, sizeof(T)))
    attention_bwd_kernel(AttentionBwdParams p, StripTiling of_queries, StripTiling of_keys,
                         BwdSides sides, BwdAligned aligned, float* delta) {
  if (sides.queries) {
    visit_side<T, DIM, false>(p, of_queries, aligned, sides, delta);
  }
  if (sides.queries && sides.keys) {
    __syncthreads();
  }
  if (sides.keys) {
    visit_side<T, DIM, true>(p, of_keys, aligned, sides, delta);
  }
}

template <typename T, int DIM>
cudaError_t launch_attention_bwd(const AttentionBwdParams& p, bool dbias, float* delta,
                                 cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  const int all_heads = static_cast<int>(s.batch * s.heads);
  const StripTiling of_queries = backward_tiling(s.queries, s.keys, DIM, sizeof(T));
  const StripTiling of_keys = backward_tiling(s.keys, s.queries, DIM, sizeof(T));
  const BwdAligned aligned = {aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)),
                              aligned_rows(p.v, sizeof(T)), aligned_rows(p.out, sizeof(T)),
                              aligned_rows(p.dout, sizeof(T))};
  const auto run = [&](const StripTiling& tiling, BwdSides sides) {
    return launch(attention_bwd_kernel<T, DIM>, dim3(tiling.blocks(all_heads)),
                  tiling.warps() * kWarp, tiling.shared_bytes, stream, p, of_queries, of_keys,
                  sides, aligned, delta);
  };
  if (s.cosine.given && !kExact<T>) {
    // The factors of cosines would carry the rounding of out into dq: delta is summed first.
    cudaError_t error = run(of_queries, {true, false, false});
    if (error == cudaSuccess) {
      error = run(of_queries, {true, false, dbias, true});
    }
    return error != cudaSuccess ? error : run(of_keys, {false, true});
  }
  // Where a block holds all strips of its heads on either side, one launch does both.
  if (of_queries.row_blocks == 1 && of_keys.row_blocks == 1 && of_queries.heads == of_keys.heads &&
      of_queries.strips == of_keys.strips && of_queries.shared_bytes == of_keys.shared_bytes) {
    return run(of_queries, {true, true, dbias});
  }
  const cudaError_t error = run(of_queries, {true, false, dbias});
  return error != cudaSuccess ? error : run(of_keys, {false, true, false});
}

template <typename T>
cudaError_t attention_bwd_of(const AttentionBwdParams& p, bool dbias, float* delta,
                             cudaStream_t stream) {
  const int64_t dim = p.scores.dim;
  if (dim <= 32) return launch_attention_bwd<T, 32>(p, dbias, delta, stream);
  if (dim <= 64) return launch_attention_bwd<T, 64>(p, dbias, delta, stream);
  if (dim <= 96) return launch_attention_bwd<T, 96>(p, dbias, delta, stream);
  return launch_attention_bwd<T, 128>(p, dbias, delta, stream);
}

}  // namespace mimkernels::cuda

// The kernel of attention_bwd for short sequences of 16-bit elements: a head's q, k and dout lie in
// shared memory at once, so that five products make all gradients.
#pragma once

#include "cuda/attention/groups.cuh"
#include "ops/attention/cuda/bwd_heads.h"
#include "ops/attention/cuda/gradient.cuh"

namespace mimkernels::cuda {

// Which operands start every row on 16 bytes.
struct HeadAligned {
  bool q = false;
  bool k = false;
  bool v = false;
  bool out = false;
  bool dout = false;
};

// A strip's rows acc * factor, rounded, to `out`, by way of rows of shared memory that no other warp
// uses.
template <typename T, int TILES>
__device__ __forceinline__ void store_gradient(const float (&acc)[TILES][4], float factor, T* rows,
                                               int stride, T* out, int64_t out_stride, int valid,
                                               int dim) {
  stage_strip(acc, factor, factor, rows, stride);
  store_rows<TILES, kStrip>(out, out_stride, rows, stride, valid, dim);
}

// The own rows' half of dout . out: two lanes share a row of `out`, which waits in registers for
// dout.
template <typename T, int DIM>
struct OutRow {
  static constexpr int kChunks = DIM / kChunk<T> / 2;
  T elements[kChunks][kChunk<T>];

  __device__ __forceinline__ void load(const T* out, int64_t stride, int rows, int dim,
                                       bool aligned) {
    const int row = threadIdx.x % kWarp / 2;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int feature = (2 * i + static_cast<int>(threadIdx.x) % 2) * kChunk<T>;
      if (row < rows && feature < dim) {
        load_chunk(elements[i], out + row * stride + feature, aligned);
      } else {
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) {
          elements[i][e] = from_float<T>(0.0f);
        }
      }
    }
  }

  // To delta[0..15] of the strip whose dout lies in shared memory.
  __device__ __forceinline__ void multiply(float* delta, const T* dout, int stride) const {
    const int row = threadIdx.x % kWarp / 2;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      T other[kChunk<T>];
      load_chunk(other, dout + row * stride + (2 * i + threadIdx.x % 2) * kChunk<T>, true);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        sum = fmaf(to_float(elements[i][e]), to_float(other[e]), sum);
      }
    }
    sum += __shfl_xor_sync(kWarpMask, sum, 1);
    if (threadIdx.x % 2 == 0) {
      delta[row] = sum;
    }
  }
};

// What a block has in shared memory of one head.
template <typename T, int DIM, bool COEF>
struct HeadMemory {
  static constexpr int kStride = row_stride<T>(DIM);
  int queries;  // with those that pad the last strip
  int tokens;   // of the strips of all warps, whose points there may be
  T* k;
  T* q;
  T* dout;
  float* numbers;  // planes of a number per query
  float2* points;
  T* groups;

  __device__ __forceinline__ HeadMemory(const HeadTiling& tiling, int local_head)
      : queries(tiling.query_strips * kStrip), tokens(tiling.warps * kHeadStrips<DIM> * kStrip) {
    unsigned char* const at = shared_memory() + local_head * tiling.head_bytes;
    k = reinterpret_cast<T*>(at);
    q = k + tiling.key_strips * kStrip * kStride;
    dout = q + queries * kStride;
    numbers = reinterpret_cast<float*>(dout + queries * kStride);
    points = reinterpret_cast<float2*>(numbers + kHeadNumbers<COEF> * queries);
    groups = reinterpret_cast<T*>(points + tiling.planes * tokens);
  }

  __device__ __forceinline__ float* lse() const { return numbers; }
  __device__ __forceinline__ float* low() const { return numbers + queries; }
  __device__ __forceinline__ float* delta() const { return numbers + 2 * queries; }
  __device__ __forceinline__ float* coef(int plane) const {
    return numbers + (3 + plane) * queries;
  }
};

// ds += c + a t + [i = j] s + w d of one group, keys by queries; `mixes`: its keys may be of the
// prefix.
template <typename T, typename Memory>
__device__ __forceinline__ void add_head_coefficients(float (&ds)[2][4],
                                                      const float (&exponent)[2][4],
                                                      const Memory& memory, int planes, int prefix,
                                                      int first_key, int first_query) {
  const int lane = threadIdx.x % kWarp;
  const int rows[2] = {first_key + lane / 4, first_key + lane / 4 + 8};
  float c[4];
  float a[4];
  load_columns(c, memory.coef(2) + first_query);
  load_columns(a, memory.coef(3) + first_query);
  if (first_key < prefix) {
    float c_prefix[4];
    float a_prefix[4];
    load_columns(c_prefix, memory.coef(0) + first_query);
    load_columns(a_prefix, memory.coef(1) + first_query);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = query_of<true>(i);
      const bool is_prefix = rows[i % 4 / 2] < prefix;
      ds[i / 4][i % 4] +=
          fmaf(is_prefix ? a_prefix[n] : a[n], fmaxf(exponent[i / 4][i % 4], kLeastExponent),
               is_prefix ? c_prefix[n] : c[n]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = query_of<true>(i);
      ds[i / 4][i % 4] += fmaf(a[n], fmaxf(exponent[i / 4][i % 4], kLeastExponent), c[n]);
    }
  }
  if (first_key == first_query) {
    float own[4];
    load_columns(own, memory.coef(4) + first_query);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = query_of<true>(i);
      ds[i / 4][i % 4] += rows[i % 4 / 2] == query_token<true>(0, first_query, n) ? own[n] : 0.0f;
    }
  }
  if (planes > 0) {
    float d[2][4];
    float far[4];
    clear(d);
    const float2* at = memory.points;
#pragma unroll 1
    for (int plane = 0; plane < planes; ++plane, at += memory.tokens) {
      const float2 from[2] = {at[rows[0]], at[rows[1]]};
      const float2* const to = at + first_query + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 point = to[i / 4 * 8 + i % 2];
        const float x = from[i % 4 / 2].x - point.x;
        const float y = from[i % 4 / 2].y - point.y;
        d[i / 4][i % 4] = fmaf(x, x, fmaf(y, y, d[i / 4][i % 4]));
      }
    }
    load_columns(far, memory.coef(5) + first_query);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      ds[i / 4][i % 4] +=
          rows[i % 4 / 2] < prefix ? 0.0f : far[query_of<true>(i)] * sqrt_fast(d[i / 4][i % 4]);
    }
  }
}

// grid:     a block per head, or for several short ones
// in:       q, k, v, out, dout by stride, features contiguous; lse, lse_low and coef contiguous, key
//           mask, positions fp32, each or none; no bias, table or cosines
// out:      dq [B, Nq, H, D], dk, dv [B, Nk, H, D], apart or the parts of [B, N, 3, H, D];
//           contiguous, every element written once
// numerics: P from lse and lse_low, everything in fp32; delta = dout . out; P and dS rounded to the
//           type of v for their products
// bounds:   keys beyond the last and masked keys have P = 0, and so have queries beyond the last;
//           tails are not stored; offsets into tensors are int64
// cost:     five products. A warp owns strips of keys: k and v as left operands, dk and dv are its
//           registers. dS of `chunk` strips of queries by all keys goes through shared memory to the
//           warps that add dq, 32 features of a strip each. Every operand is read once; no atomics,
//           deterministic
template <typename T, int DIM, bool COEF>
__global__ void __launch_bounds__(kHeadWarps<DIM>* kWarp, 1)
    attention_bwd_heads_kernel(AttentionBwdParams p, HeadTiling tiling, HeadAligned aligned) {
  constexpr int kSteps = DIM / kStep<T>;
  constexpr int kChunks = DIM / kChunk<T>;
  constexpr int kStrips = kHeadStrips<DIM>;
  constexpr int kGroup = kStrip * kStrip;
  constexpr int kPart = 32;  // features of dq that a warp adds at a time
  using Memory = HeadMemory<T, DIM, COEF>;
  constexpr int kStride = Memory::kStride;
  const AttentionScores& s = p.scores;
  const int images = static_cast<int>(s.batch);
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int local_head = warp / tiling.warps;
  const int own = warp % tiling.warps;
  // The last block may have more places than there are heads: they repeat the last head.
  const int wanted = static_cast<int>(blockIdx.x) * tiling.heads + local_head;
  const bool stores = wanted < images * heads;
  const int head = stores ? wanted : images * heads - 1;
  const int b = head / heads;
  const int h = head % heads;
  const int first_key = own * kStrips * kStrip;
  const Memory memory(tiling, local_head);

  const int worker = own * kWarp + lane;
  const int workers = tiling.warps * kWarp;
  const auto load = [&](T* to, const HeadRows& rows, int count, int valid, bool is_aligned) {
    load_rows_of<kChunks>(to, kStride, head_at<T>(rows, b, h, 0), rows.stride_token, count, valid,
                          dim, is_aligned, worker, workers);
  };
  load(memory.k, s.k, tiling.key_strips * kStrip, keys, aligned.k);
  load(memory.q, s.q, memory.queries, queries, aligned.q);
  load(memory.dout, p.dout, memory.queries, queries, aligned.dout);
  copy_async_commit();
  for (int query = worker; query < memory.queries; query += workers) {
    const Level level = load_level<T>(p.lse, p.lse_low, head, queries, query);
    memory.lse()[query] = level.lse;
    memory.low()[query] = level.low;
    if constexpr (COEF) {
      const Coefficients of = load_coefficients<T>(p, head, query);
      memory.coef(0)[query] = of.c_prefix;
      memory.coef(1)[query] = of.a_prefix;
      memory.coef(2)[query] = of.c_patch;
      memory.coef(3)[query] = of.a_patch;
      memory.coef(4)[query] = of.own;
      memory.coef(5)[query] = of.far;
    }
  }
  if constexpr (COEF) {
    const HeadPositions positions(p.positions, b, keys);
    for (int i = worker; i < tiling.planes * memory.tokens; i += workers) {
      const int token = i % memory.tokens;
      const int plane = i / memory.tokens * 2;
      const auto at = [&](int d) { return d < positions.dims ? positions.at(token, d) : 0.0f; };
      memory.points[i] = make_float2(at(plane), at(plane + 1));
    }
  }
  uint32_t v_left[kStrips][kSteps][4];
  fetch_left(v_left, head_at<T>(p.v, b, h, 0) + first_key * p.v.stride_token, p.v.stride_token,
             keys - first_key, dim, aligned.v);
  unsigned hidden = 0;  // a bit for each of the lane's keys
#pragma unroll
  for (int i = 0; i < 2 * kStrips; ++i) {
    const int key = first_key + lane / 4 + i * 8;
    const bool hides =
        key >= keys || (s.key_mask.given && s.key_mask.data[b * s.key_mask.stride0 + key] == 0);
    hidden |= static_cast<unsigned>(hides) << i;
  }
  const bool hides = __any_sync(kWarpMask, hidden != 0);

  OutRow<T, DIM> out;
  const auto load_out = [&](int strip) {
    out.load(head_at<T>(p.out, b, h, 0) + strip * kStrip * p.out.stride_token, p.out.stride_token,
             queries - strip * kStrip, dim, aligned.out);
  };
  load_out(own);
  copy_async_wait<0>();
  __syncthreads();
#pragma unroll 1
  for (int strip = own; strip < tiling.query_strips;) {
    out.multiply(memory.delta() + strip * kStrip, memory.dout + strip * kStrip * kStride, kStride);
    strip += tiling.warps;
    load_out(strip);
  }
  const LeftKeys<T, kStrips, kSteps, kStrips == 1> k_left(memory.k, kStride, own * kStrips,
                                                          tiling.key_strips);
  __syncthreads();

  const float scale = s.scale;
  float dk[kStrips][DIM / 8][4] = {};
  float dv[kStrips][DIM / 8][4] = {};
  for (int first = 0; first < tiling.query_strips; first += tiling.chunk) {
    const int count = min(tiling.chunk, tiling.query_strips - first);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int query = (first + i) * kStrip;
      const T* const q_rows = memory.q + query * kStride;
      const T* const dout_rows = memory.dout + query * kStride;
      float score[kStrips][2][4];  // then P, or where P is made again (COEF) its exponent
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        clear(score[strip]);
      }
      add_strip_products<T, kSteps>(score, q_rows, kStride, k_left);
      float lse[4];
      float low[4];
      load_columns(lse, memory.lse() + query);
      load_columns(low, memory.low() + query);
      uint32_t packed[kStrips][4];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        float (&x)[2][4] = score[strip];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          x[e / 4][e % 4] = fmaf(x[e / 4][e % 4], scale, -lse[query_of<true>(e)]);
        }
        if (hides) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const bool is_hidden = hidden >> (2 * strip + e % 4 / 2) & 1;
            x[e / 4][e % 4] = is_hidden ? -kInfinity : x[e / 4][e % 4];
          }
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          x[e / 4][e % 4] = fmaf(x[e / 4][e % 4], kUnitsOfOne<T>, -low[query_of<true>(e)]);
        }
        float made[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          made[e / 4][e % 4] = power<T>(x[e / 4][e % 4]);
          if (!COEF) {
            x[e / 4][e % 4] = made[e / 4][e % 4];
          }
        }
        pack_group<T>(packed[strip], made);
      }
      add_weighted_strips<T>(dv, packed, left_row(dout_rows, kStride));

      float ds[kStrips][2][4];  // from dP - delta
      float delta[4];
      load_columns(delta, memory.delta() + query);
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          ds[strip][e / 4][e % 4] = -delta[query_of<true>(e)];
        }
      }
      add_strip_products<T, kSteps>(
          ds, dout_rows, kStride,
          [&](uint32_t (&a)[4], int strip, int step) { copy_fragment(a, v_left[strip][step]); });
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        if constexpr (COEF) {
          add_head_coefficients<T>(ds[strip], score[strip], memory, tiling.planes,
                                   static_cast<int>(p.num_prefix), first_key + strip * kStrip,
                                   query);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float x = score[strip][e / 4][e % 4];
          ds[strip][e / 4][e % 4] *= COEF ? power<T>(x) : x;
        }
        pack_group<T>(packed[strip], ds[strip]);
        if (own * kStrips + strip < tiling.key_strips) {
          store_group(memory.groups + (i * tiling.key_strips + own * kStrips + strip) * kGroup,
                      packed[strip]);
        }
      }
      add_weighted_strips<T>(dk, packed, left_row(q_rows, kStride));
    }
    __syncthreads();
#pragma unroll 1
    for (int unit = own; unit < count * (DIM / kPart); unit += tiling.warps) {
      const int i = unit / (DIM / kPart);
      const int feature = unit % (DIM / kPart) * kPart;
      const int query = (first + i) * kStrip;
      const T* groups = memory.groups + i * tiling.key_strips * kGroup;
      const T* k_rows = left_row(memory.k, kStride) + feature;
      float dq[1][kPart / 8][4] = {};
#pragma unroll 4
      for (int j = 0; j < tiling.key_strips; ++j) {
        uint32_t gradient[1][4];
        load_transposed_group(gradient[0], groups);
        add_weighted_strips<T>(dq, gradient, k_rows);
        groups += kGroup;
        k_rows += kStrip * kStride;
      }
      // No warp reads these rows of q any more.
      store_gradient(dq[0], scale, memory.q + query * kStride + feature, kStride,
                     static_cast<T*>(p.dq) + (b * int64_t{queries} + query) * p.stride_grad +
                         h * s.dim + feature,
                     p.stride_grad, stores ? queries - query : 0, min(dim - feature, kPart));
    }
    __syncthreads();
  }
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
    const int key = first_key + strip * kStrip;
    if (key >= keys) {
      continue;
    }
    const int64_t offset = (b * int64_t{keys} + key) * p.stride_grad + h * s.dim;
    T* const rows = memory.k + key * kStride;
    store_gradient(dk[strip], scale, rows, kStride, static_cast<T*>(p.dk) + offset, p.stride_grad,
                   stores ? keys - key : 0, dim);
    store_gradient(dv[strip], 1.0f, rows, kStride, static_cast<T*>(p.dv) + offset, p.stride_grad,
                   stores ? keys - key : 0, dim);
  }
}

template <typename T, int DIM>
cudaError_t launch_heads(const AttentionBwdParams& p, const HeadTiling& tiling,
                         cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  const HeadAligned aligned = {aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)),
                               aligned_rows(p.v, sizeof(T)), aligned_rows(p.out, sizeof(T)),
                               aligned_rows(p.dout, sizeof(T))};
  const dim3 grid(tiling.blocks(static_cast<int>(s.batch * s.heads)));
  const auto run = [&](auto kernel) {
    return launch(kernel, grid, tiling.threads(), tiling.shared_bytes, stream, p, tiling, aligned);
  };
  return p.has_coef ? run(attention_bwd_heads_kernel<T, DIM, true>)
                    : run(attention_bwd_heads_kernel<T, DIM, false>);
}

template <typename T>
cudaError_t attention_bwd_heads(const AttentionBwdParams& p, const HeadTiling& tiling,
                                cudaStream_t stream) {
  return p.scores.dim <= 32 ? launch_heads<T, 32>(p, tiling, stream)
                            : launch_heads<T, 64>(p, tiling, stream);
}

}  // namespace mimkernels::cuda

// attention_bwd: sums of dS over the images or heads that share a bias or a table, and the choice of
// the kernels.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/row_sums.h"
#include "cuda/sums.cuh"
#include "ops/attention/cuda.h"
#include "ops/attention/cuda/bwd_heads.h"
#include "ops/attention/cuda/gradient.cuh"
#include "ops/attention/cuda/sums.h"

namespace mimkernels::cuda {

// Of attention_bwd_fp32.cu, attention_bwd_bf16.cu and attention_bwd_fp16.cu.
template <typename T>
cudaError_t attention_bwd_of(const AttentionBwdParams& p, bool dbias, float* delta,
                             cudaStream_t stream);

namespace {

struct BiasAligned {
  bool q = false;
  bool k = false;
  bool v = false;
  bool dout = false;
};

// grid:     key blocks, fastest, row blocks, heads, windows and groups of sums; a block owns a tile
//           and visits the images of its group and the heads that share it
// in:       as attention_bwd_kernel, whose delta it reads
// out:      to [groups, windows, heads, Nq, Nk], fp32 or the type of q, or null; products, or null:
//           each block's sum of dS times the cosines' part of S; contiguous, every element written once
// numerics: fp32 sums of dS, images ascending, then heads; rounded once
// bounds:   tails are not stored; offsets are int64
// cost:     two products per tile, image and head, two of which are in shared memory; no atomics,
//           deterministic
template <typename T>
__global__ void __launch_bounds__(256, 1)
    attention_dbias_kernel(AttentionBwdParams p, BiasTiling tiling, ScoreSums sums,
                           RowShape<T> shape, BiasAligned aligned, const float* delta, void* to,
                           bool is_float, float* products) {
  const AttentionScores& s = p.scores;
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int warp = threadIdx.x / kWarp;
  const int block = static_cast<int>(blockIdx.x);
  const int first_key = block % tiling.key_blocks * tiling.groups * kStrip;
  const int first_query = block / tiling.key_blocks % tiling.row_blocks * tiling.strips * kStrip;
  const int kept = block / tiling.key_blocks / tiling.row_blocks;  // head, window and group
  const int window = kept / sums.heads % sums.windows;
  const int first_image = kept / sums.heads / sums.windows * sums.per_group;  // of the window's
  const int images = min(sums.per_group, static_cast<int>(s.batch) / sums.windows - first_image);
  const int shared_heads = sums.heads == 1 ? heads : 1;
  const int members = images * shared_heads;
  const int row = first_query + warp % tiling.strips * kStrip;
  const int column = first_key + warp / tiling.strips * kStrip;

  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int query_rows = tiling.strips * kStrip * shape.stride;
  const int key_rows = tiling.groups * kStrip * shape.stride;
  const auto image_of = [&](int member) {
    return window + (first_image + member / shared_heads) * sums.windows;
  };
  const auto head_of = [&](int member) { return kept % sums.heads + member % shared_heads; };
  const auto start = [&](int member) {
    T* at = shared + member % 2 * 2 * (query_rows + key_rows);
    const auto load = [&](const HeadRows& rows, int count, int first, int tokens, bool is_aligned) {
      load_rows(at, shape.stride, shape.chunks,
                head_at<T>(rows, image_of(member), head_of(member), first), rows.stride_token,
                count * kStrip, tokens - first, dim, is_aligned, static_cast<int>(threadIdx.x),
                static_cast<int>(blockDim.x));
      at += count * kStrip * shape.stride;
    };
    load(s.q, tiling.strips, first_query, queries, aligned.q);
    load(p.dout, tiling.strips, first_query, queries, aligned.dout);
    load(s.k, tiling.groups, first_key, keys, aligned.k);
    load(p.v, tiling.groups, first_key, keys, aligned.v);
    copy_async_commit();
  };
  if (members > 0) {
    start(0);
  }

  float sum[2][4] = {};
  CompensatedSum product;
  for (int member = 0; member < members; ++member) {
    copy_async_wait<0>();
    __syncthreads();
    if (member + 1 < members) {
      start(member + 1);
    }
    if (row >= queries || column >= keys) {
      continue;
    }
    const int b = image_of(member);
    const int h = head_of(member);
    const int head = b * heads + h;
    const HeadTerms terms(s, b, h);
    const GroupTerms group = load_terms<T, false>(terms, row, column);
    Level level[2];
    float row_delta[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int query = query_token<false>(row, 0, n);
      level[n] = load_level<T>(p.lse, p.lse_low, head, queries, query);
      row_delta[n] = query < queries ? delta[head * s.queries + query] : 0.0f;
    }
    const T* const q_rows = shared + member % 2 * 2 * (query_rows + key_rows) +
                            warp % tiling.strips * kStrip * shape.stride;
    const T* const k_rows = shared + member % 2 * 2 * (query_rows + key_rows) + 2 * query_rows +
                            warp / tiling.strips * kStrip * shape.stride;
    float score[2][4];
    float ds[2][4];
    multiply_rows<T>(score, q_rows, k_rows, shape.stride, shape.steps);
    multiply_rows<T>(ds, q_rows + query_rows, k_rows + key_rows, shape.stride, shape.steps);
    make_cosines<false>(score, terms, row, column);
    float cosine[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      cosine[i / 4][i % 4] = score[i / 4][i % 4];
    }
    float delta_error[2] = {};  // unused
    score_gradient<T, false>(score, ds, delta_error, p, group, level, row_delta,
                             HeadPositions(p.positions, b, keys), head, row, column);
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i / 4][i % 4] += ds[i / 4][i % 4];
      part = fmaf(ds[i / 4][i % 4], cosine[i / 4][i % 4], part);
    }
    product.add(part);
  }
  if (to != nullptr) {
    store_dbias<T>(to, is_float, s, int64_t{kept} * queries * keys, row, column, sum);
  }
  if (products == nullptr) {
    return;
  }
  float total = product.total();
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    total += __shfl_xor_sync(kWarpMask, total, step);
  }
  float* const of_warps = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    of_warps[warp] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
      total += of_warps[w];
    }
    products[block] = total;
  }
}

template <typename T>
cudaError_t launch_sums(const AttentionBwdParams& p, const ScoreSums& sums, const float* delta,
                        void* to, bool is_float, float* products, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  const RowShape<T> shape(s.dim);
  const BiasTiling tiling = bias_tiling(s.queries, s.keys, static_cast<int>(s.dim), sizeof(T));
  const BiasAligned aligned = {aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)),
                               aligned_rows(p.v, sizeof(T)), aligned_rows(p.dout, sizeof(T))};
  if (sums.blocks == 0) {
    return cudaSuccess;
  }
  return launch(attention_dbias_kernel<T>, dim3(static_cast<unsigned>(sums.blocks)),
                tiling.warps() * kWarp, tiling.shared_bytes, stream, p, tiling, sums, shape,
                aligned, delta, to, is_float, products);
}

// Sums of dS, in `type`; of several groups by way of `partial`.
template <typename T>
cudaError_t sum_scores(const AttentionBwdParams& p, const ScoreSums& sums, const float* delta,
                       float* partial, void* to, DType type, float* products, cudaStream_t stream) {
  if (sums.groups == 1) {
    return launch_sums<T>(p, sums, delta, to, type == DType::kFloat32, products, stream);
  }
  const cudaError_t error = launch_sums<T>(p, sums, delta, partial, true, products, stream);
  return error != cudaSuccess ? error
                              : sum_partials(type, partial, sums.groups, sums.elements, to, stream);
}

// An fp32 bias beside 16-bit rows has its gradient from the delta that the others are summed for.
bool shares_bias(const AttentionScores& s) {
  return s.bias.windows != s.batch || s.bias.heads != s.heads || s.bias.dtype != s.dtype;
}

// Where the parts of the workspace begin.
struct Workspace {
  int64_t rows;  // one for every query of every head: delta, which comes first
  int64_t products;
  int64_t factors;
  int64_t scores;   // the sums of dS of a table
  int64_t partial;  // of those and of a bias, one after the other
  int64_t size;

  explicit Workspace(const AttentionBwdParams& p) {
    const AttentionScores& s = p.scores;
    rows = s.batch * s.heads * s.queries;
    products = rows;
    factors = products + (p.dlogit_scale != nullptr ? ScoreSums(s, 1, s.heads).blocks : 0);
    scores = factors + cosine_factors_workspace(s);
    partial = scores;
    size = scores;
    const auto reserve = [&](const ScoreSums& sums) {
      const int64_t needed = sums.groups > 1 ? sums.groups * sums.elements : 0;
      size = partial + needed > size ? partial + needed : size;
    };
    if (p.dtable != nullptr) {
      partial += s.heads * s.queries * s.keys;
      reserve(ScoreSums(s, 1, s.heads));
    }
    if (p.dbias != nullptr && shares_bias(s)) {
      reserve(ScoreSums(s, s.bias.windows, s.bias.heads));
    }
    size = partial > size ? partial : size;
  }
};

// dq, dk, dv, and dbias where nothing shares it.
template <typename T>
cudaError_t bwd_of(const AttentionBwdParams& p, bool dbias, float* delta, cudaStream_t stream) {
  if constexpr (!kExact<T>) {
    HeadTiling tiling;
    const cudaError_t error = choose_heads(tiling, p);
    if (error != cudaSuccess) return error;
    if (tiling.chunk > 0) return attention_bwd_heads<T>(p, tiling, stream);
  }
  return attention_bwd_of<T>(p, dbias, delta, stream);
}

}  // namespace

cudaError_t choose_heads(HeadTiling& tiling, const AttentionBwdParams& p) {
  const AttentionScores& s = p.scores;
  const char* const given = std::getenv("MIMKERNELS_CUDA_ATTENTION_BWD");
  const std::string wanted = given == nullptr || *given == 0 ? "one-pass" : given;
  if (wanted != "one-pass" && wanted != "two-passes") {
    throw std::invalid_argument("MIMKERNELS_CUDA_ATTENTION_BWD=" + wanted +
                                " is none of: one-pass, two-passes");
  }
  if (wanted == "two-passes") return cudaSuccess;
  if (s.bias.given || s.table.given || s.cosine.given) return cudaSuccess;
  const bool has_points = p.has_coef && p.positions.given;
  if (has_points && s.queries != s.keys) return cudaSuccess;
  int device = 0;
  int budget = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&budget, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    tiling = head_tiling(s.queries, s.keys, static_cast<int>(s.dim), p.has_coef,
                         has_points ? p.positions.dims : 0, budget);
  }
  return error;
}

int64_t attention_bwd_workspace(const AttentionBwdParams& p) { return Workspace(p).size; }

cudaError_t attention_bwd(const AttentionBwdParams& given, float* workspace, cudaStream_t stream) {
  AttentionBwdParams p = given;
  const AttentionScores& s = p.scores;
  const Workspace parts(p);
  float* const delta = workspace;
  // Summed with the bias or the table, where these sums are by head.
  float* const products = p.dlogit_scale != nullptr ? workspace + parts.products : nullptr;
  float* const partial = workspace + parts.partial;
  const bool sums_bias = p.dbias != nullptr && shares_bias(s);
  const bool by_head = sums_bias && s.bias.windows == 1 && s.bias.heads == s.heads;
  const ScoreSums of_heads(s, 1, s.heads);
  const cudaError_t error = cosine_factors(p.scores, workspace + parts.factors, stream);
  if (error != cudaSuccess) {
    return error;
  }
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t error = cudaSuccess;
    if (s.batch * s.heads > 0) {
      error = bwd_of<T>(p, p.dbias != nullptr && !sums_bias, delta, stream);
    }
    if (error == cudaSuccess && sums_bias) {
      error = sum_scores<T>(p, ScoreSums(s, s.bias.windows, s.bias.heads), delta, partial, p.dbias,
                            s.bias.dtype, by_head ? products : nullptr, stream);
    }
    if (error == cudaSuccess && p.dtable != nullptr) {
      float* const ds = workspace + parts.scores;
      error = sum_scores<T>(p, of_heads, delta, partial, ds, DType::kFloat32, products, stream);
      if (error == cudaSuccess) {
        error = table_gradient(p, ds, stream);
      }
    }
    // Not products: of no tiles they may have no address, and their sum is 0.
    if (error == cudaSuccess && p.dlogit_scale != nullptr) {
      if (!by_head && p.dtable == nullptr) {
        error = launch_sums<T>(p, of_heads, delta, nullptr, true, products, stream);
      }
      if (error == cudaSuccess) {
        const int64_t tiles = s.heads > 0 ? of_heads.blocks / of_heads.groups / s.heads : 0;
        error = logit_scale_gradient(p, products, of_heads.groups, tiles, stream);
      }
    }
    return error;
  });
}

}  // namespace mimkernels::cuda

// attention_bwd: the gradient of a bias that images or heads share, and the choice of the kernels.
#include "ops/attention/cuda.h"
#include "ops/attention/cuda/gradient.cuh"

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

// grid:     key blocks, fastest, row blocks, heads and images of dbias; a block owns a tile of it
//           and visits all images and heads that share it
// in:       as attention_bwd_kernel, whose delta it reads
// out:      dbias [B or 1, H or 1, Nq, Nk], contiguous, every element written once
// numerics: fp32 sums of dS, images ascending, then heads; rounded once
// bounds:   tails are not stored; offsets are int64
// cost:     two products per tile, image and head, two of which are in shared memory; no atomics,
//           deterministic
template <typename T>
__global__ void __launch_bounds__(256, 1)
    attention_dbias_kernel(AttentionBwdParams p, BiasTiling tiling, RowShape<T> shape,
                           BiasAligned aligned, const float* delta) {
  const AttentionScores& s = p.scores;
  const int heads = static_cast<int>(s.heads);
  const int queries = static_cast<int>(s.queries);
  const int keys = static_cast<int>(s.keys);
  const int dim = static_cast<int>(s.dim);
  const int bias_heads = static_cast<int>(s.bias.heads);
  const int warp = threadIdx.x / kWarp;
  const int block = static_cast<int>(blockIdx.x);
  const int first_key = block % tiling.key_blocks * tiling.groups * kStrip;
  const int first_query = block / tiling.key_blocks % tiling.row_blocks * tiling.strips * kStrip;
  const int kept = block / tiling.key_blocks / tiling.row_blocks;  // image and head of dbias
  const int shared_images = s.bias.windows == 1 ? static_cast<int>(s.batch) : 1;
  const int shared_heads = bias_heads == 1 ? heads : 1;
  const int members = shared_images * shared_heads;
  const int row = first_query + warp % tiling.strips * kStrip;
  const int column = first_key + warp / tiling.strips * kStrip;

  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int query_rows = tiling.strips * kStrip * shape.stride;
  const int key_rows = tiling.groups * kStrip * shape.stride;
  const auto image_of = [&](int member) { return kept / bias_heads + member / shared_heads; };
  const auto head_of = [&](int member) { return kept % bias_heads + member % shared_heads; };
  const auto start = [&](int member) {
    T* to = shared + member % 2 * 2 * (query_rows + key_rows);
    const auto load = [&](const HeadRows& rows, int count, int first, int tokens, bool is_aligned) {
      load_rows(to, shape.stride, shape.chunks,
                head_at<T>(rows, image_of(member), head_of(member), first), rows.stride_token,
                count * kStrip, tokens - first, dim, is_aligned, static_cast<int>(threadIdx.x),
                static_cast<int>(blockDim.x));
      to += count * kStrip * shape.stride;
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
    const GroupTerms group = load_terms<T, false>(HeadTerms(s, b, h), row, column);
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
    float delta_error[2] = {};  // unused
    score_gradient<T, false>(score, ds, delta_error, p, group, level, row_delta,
                             HeadPositions(p.positions, b, keys), head, row, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i / 4][i % 4] += ds[i / 4][i % 4];
    }
  }
  store_dbias<T>(p, int64_t{kept} * queries * keys, row, column, sum);
}

template <typename T>
cudaError_t launch_dbias(const AttentionBwdParams& p, const float* delta, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  const RowShape<T> shape(s.dim);
  const BiasTiling tiling = bias_tiling(s.queries, s.keys, static_cast<int>(s.dim), sizeof(T));
  const BiasAligned aligned = {aligned_rows(s.q, sizeof(T)), aligned_rows(s.k, sizeof(T)),
                               aligned_rows(p.v, sizeof(T)), aligned_rows(p.dout, sizeof(T))};
  const int64_t blocks = s.bias.windows * s.bias.heads * tiling.row_blocks * tiling.key_blocks;
  if (blocks == 0) {
    return cudaSuccess;
  }
  return launch(attention_dbias_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                tiling.warps() * kWarp, tiling.shared_bytes, stream, p, tiling, shape, aligned,
                delta);
}

}  // namespace

cudaError_t attention_bwd(const AttentionBwdParams& p, float* delta, cudaStream_t stream) {
  const AttentionScores& s = p.scores;
  // An fp32 bias beside 16-bit rows has its gradient from the delta that the others are summed for.
  const bool shares_bias =
      s.bias.windows != s.batch || s.bias.heads != s.heads || s.bias.dtype != s.dtype;
  return with_float_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    cudaError_t error = cudaSuccess;
    if (s.batch * s.heads > 0) {
      error = attention_bwd_of<T>(p, p.dbias != nullptr && !shares_bias, delta, stream);
    }
    if (error == cudaSuccess && p.dbias != nullptr && shares_bias) {
      error = launch_dbias<T>(p, delta, stream);
    }
    return error;
  });
}

}  // namespace mimkernels::cuda

// out[b, c] = the mean, the maximum, or (mean of max(x, eps)^p)^(1/p) of x[b, n, c] over the
// allowed tokens n; zeros where no token is allowed.
//
// in:       x [B, N, D] by strides, last dim contiguous; mask [B, N] or null; p [1] fp32
// out:      out [B, D]; of the maximum also its token [B, D] int32 (the first of equals, -1 for
//           none), of the power mean also the mean of the powers [B, D] fp32
// numerics: fp32 sums of 8 tokens each, added in order; powers as exp(p log x), cubes as products
// cost:     x read once, excluded tokens not at all; a thread owns columns of images
#include "kernels.h"
#include "reduce_pool.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// acc[c] += the sum over the block's rows of value(x[c]).
template <typename T, typename Value>
MIMKERNELS_INLINE void add_block(const T* const (&rows)[kBlock], int count, int64_t dim, float* acc,
                                 const Value& value) {
  const auto at = [&](int64_t c, int64_t n, auto whole) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = decltype(whole)::value;
    Pack16 sum = value(load_columns<16, kWhole>(rows[0] + c, n));
    for (int i = 1; i < count; ++i) sum = sum + value(load_columns<16, kWhole>(rows[i] + c, n));
    store<16>(acc + c, load<16>(acc + c) + sum);
  };
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16) at(c, 16, std::true_type{});
  if (c < dim) at(c, dim - c, std::false_type{});
}

// best[c] and index[c] follow the largest so far; NaN is larger than anything.
template <typename T>
MIMKERNELS_INLINE void max_block(const T* const (&rows)[kBlock], const int64_t (&token)[kBlock],
                                 int count, int64_t dim, float* best, int32_t* index) {
  using F = Pack16::Vec::F;
  using I = Pack16::Vec::I;
  const auto at = [&](int64_t c, int64_t n, auto whole) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = decltype(whole)::value;
    Pack16 most = load<16>(best + c);
    I from[Pack16::kParts];
    memcpy(from, index + c, sizeof(from));
    for (int i = 0; i < count; ++i) {
      const Pack16 x = load_columns<16, kWhole>(rows[i] + c, n);
      const I here = (I){} + static_cast<int32_t>(token[i]);
      MIMKERNELS_UNROLL
      for (int v = 0; v < Pack16::kParts; ++v) {
        const F old = most.v[v];
        const I larger = (from[v] < 0) | (x.v[v] > old) | ((x.v[v] != x.v[v]) & (old == old));
        most.v[v] = larger ? x.v[v] : old;
        from[v] = larger ? here : from[v];
      }
    }
    store<16>(best + c, most);
    memcpy(index + c, from, sizeof(from));
  };
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16) at(c, 16, std::true_type{});
  if (c < dim) at(c, dim - c, std::false_type{});
}

template <typename T>
void reduce_tile(const ReducePoolParams& p, int64_t b, int64_t first, int64_t dim) {
  alignas(64) float acc[kReduceTile + 16];
  alignas(64) int32_t index[kReduceTile + 16];
  for (int64_t c = 0; c < dim + 16; ++c) {
    acc[c] = 0.0f;
    index[c] = -1;
  }
  const float exponent = p.kind == ReduceKind::kGem ? *p.p : 1.0f;
  const Pack16 eps = broadcast<16>(p.eps);
  const Pack16 by = broadcast<16>(exponent);
  TokenBlocks blocks(p.mask, p.num_prefix, b, 0, p.tokens);
  const T* rows[kBlock];
  int64_t allowed = 0;
  while (blocks.next()) {
    const int64_t (&token)[kBlock] = blocks.block().token;
    const int count = blocks.block().count;
    for (int i = 0; i < count; ++i) rows[i] = row_at<T>(p.x, b, token[i]) + first;
    allowed += count;
    if (p.kind == ReduceKind::kMean) {
      add_block(rows, count, dim, acc, [](const Pack16& x) MIMKERNELS_LAMBDA_INLINE { return x; });
    } else if (p.kind == ReduceKind::kMax) {
      max_block(rows, token, count, dim, acc, index);
    } else if (exponent == 3.0f) {
      add_block(rows, count, dim, acc, [&](const Pack16& x) MIMKERNELS_LAMBDA_INLINE {
        const Pack16 z = at_least(x, eps);
        return z * z * z;
      });
    } else {
      add_block(rows, count, dim, acc, [&](const Pack16& x) MIMKERNELS_LAMBDA_INLINE {
        return exp_of(by * log_of(at_least(x, eps)));
      });
    }
  }
  const int64_t at = b * p.dim + first;
  if (p.kind == ReduceKind::kMax) {
    memcpy(p.index + at, index, static_cast<size_t>(dim) * sizeof(int32_t));
  } else {
    const Pack16 count = broadcast<16>(static_cast<float>(max_of(allowed, 1)));
    for (int64_t c = 0; c < dim; c += 16) store<16>(acc + c, load<16>(acc + c) / count);
  }
  if (p.kind == ReduceKind::kGem) {
    memcpy(p.moment + at, acc, static_cast<size_t>(dim) * sizeof(float));
    for (int64_t c = 0; allowed > 0 && c < dim; c += 16) {
      store<16>(acc + c, exp_of(log_of(load<16>(acc + c)) / by));
    }
  }
  round_acc<false>(static_cast<T*>(p.out) + at, acc, dim);
}

}  // namespace

Status reduce_pool_fwd(const ReducePoolParams& p, ParallelFor parallel_for) {
  if (p.tokens > INT32_MAX) return unsupported();
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const ReduceTasks tasks(p);
    const int64_t bytes = p.tokens * min_of(tasks.tile, p.dim) * static_cast<int64_t>(sizeof(T));
    run_parallel(parallel_for, tasks.count, grain_for(bytes), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        reduce_tile<T>(p, tasks.image(task), tasks.first(task), tasks.columns(task));
      }
    });
    return Status{};
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

// out[b, c] = the mean, the maximum, or (mean of max(x, eps)^p)^(1/p) of x[b, n, c] over the
// allowed tokens n; zeros where no token is allowed.
//
// in:       x [B, N, D] by strides, last dim contiguous; mask [B, N] or null; p [1] fp32
// out:      out [B, D]; of the maximum also its token [B, D] int32 (the first of equals, -1 for
//           none), of the power mean also the mean of the powers [B, D] fp32
// numerics: fp32 sums of 8 tokens each, added in order in runs of 128 tokens; cubes as products,
//           other powers with an exact exponent (pow_lanes)
// cost:     x read once, excluded tokens not at all; a thread owns columns of images
#include "cpu/kernels.h"
#include "ops/reduce_pool/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// The rows of a block, and those to ask for on the way: of the block after it, line by line.
template <typename T>
struct BlockOfRows {
  const T* row[kBlock];
  const T* next[kBlock];
  int count;
};

// at(c, n, whole) for every 16 columns, the next block's lines asked for before each.
template <typename T, typename At>
MIMKERNELS_INLINE void walk_columns(const BlockOfRows<T>& block, int64_t dim, const At& at) {
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16) {
    MIMKERNELS_UNROLL
    for (int i = 0; i < kBlock; ++i) prefetch(block.next[i] + c);
    at(c, 16, std::true_type{});
  }
  if (c < dim) at(c, dim - c, std::false_type{});
}

// acc[c] += the sum over the block's rows of value(x[c]).
template <typename T, typename Value>
MIMKERNELS_INLINE void add_block(const BlockOfRows<T>& block, int64_t dim, float* acc,
                                 const Value& value) {
  walk_columns(block, dim, [&](int64_t c, int64_t n, auto whole) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = decltype(whole)::value;
    Pack16 sum = value(load_columns<16, kWhole>(block.row[0] + c, n));
    for (int i = 1; i < block.count; ++i) {
      sum = sum + value(load_columns<16, kWhole>(block.row[i] + c, n));
    }
    store<16>(acc + c, load<16>(acc + c) + sum);
  });
}

// best[c] and index[c] follow the largest so far, from the first block on; NaN is larger than
// anything.
template <typename T>
MIMKERNELS_INLINE void max_block(const BlockOfRows<T>& block, const int64_t (&token)[kBlock],
                                 bool first, int64_t dim, float* best, int32_t* index) {
  using F = Pack16::Vec::F;
  using I = Pack16::Vec::I;
  walk_columns(block, dim, [&](int64_t c, int64_t n, auto whole) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = decltype(whole)::value;
    Pack16 most;
    I from[Pack16::kParts];
    if (first) {
      most = load_columns<16, kWhole>(block.row[0] + c, n);
      for (I& part : from) part = (I){} + static_cast<int32_t>(token[0]);
    } else {
      most = load<16>(best + c);
      memcpy(from, index + c, sizeof(from));
    }
    for (int i = first ? 1 : 0; i < block.count; ++i) {
      const Pack16 x = load_columns<16, kWhole>(block.row[i] + c, n);
      const I here = (I){} + static_cast<int32_t>(token[i]);
      MIMKERNELS_UNROLL
      for (int v = 0; v < Pack16::kParts; ++v) {
        const F old = most.v[v];
        const I larger = ~(x.v[v] <= old) & (old == old);
        most.v[v] = larger ? x.v[v] : old;
        from[v] = larger ? here : from[v];
      }
    }
    store<16>(best + c, most);
    memcpy(index + c, from, sizeof(from));
  });
}

template <typename T>
void reduce_tile(const ReducePoolParams& p, int64_t b, int64_t first, int64_t dim) {
  alignas(64) float acc[kReduceTile + 16];
  alignas(64) float run[kReduceTile + 16];  // the sums of the last tokens
  alignas(64) int32_t index[kReduceTile + 16];
  for (int64_t c = 0; c < dim + 16; ++c) {
    acc[c] = 0.0f;
    run[c] = 0.0f;
    index[c] = -1;
  }
  const float exponent = p.kind == ReduceKind::kGem ? *p.p : 1.0f;
  const Pack16 eps = broadcast<16>(p.eps);
  const Power power(exponent);
  const Power root(1.0f / exponent);
  TokenBlocks blocks(p.mask, p.num_prefix, b, 0, p.tokens);
  BlockOfRows<T> block;
  int64_t allowed = 0;
  while (blocks.next()) {
    const Block& here = blocks.block();
    const Block& ahead = blocks.upcoming();
    block.count = here.count;
    for (int i = 0; i < kBlock; ++i) {
      block.row[i] = row_at<T>(p.x, b, here.token[i < here.count ? i : 0]) + first;
      block.next[i] = i < ahead.count ? row_at<T>(p.x, b, ahead.token[i]) + first : block.row[i];
    }
    if (p.kind == ReduceKind::kMean) {
      add_block(block, dim, run, [](const Pack16& x) MIMKERNELS_LAMBDA_INLINE { return x; });
    } else if (p.kind == ReduceKind::kMax) {
      max_block(block, here.token, allowed == 0, dim, acc, index);
    } else if (exponent == 3.0f) {
      add_block(block, dim, run, [&](const Pack16& x) MIMKERNELS_LAMBDA_INLINE {
        const Pack16 z = at_least(x, eps);
        return z * z * z;
      });
    } else {
      add_block(block, dim, run, [&](const Pack16& x) MIMKERNELS_LAMBDA_INLINE {
        return pow_of(at_least(x, eps), power);
      });
    }
    allowed += here.count;
    if (p.kind != ReduceKind::kMax && (allowed % kSumRun == 0 || ahead.count == 0)) {
      close_run(acc, run, dim);
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
      store<16>(acc + c, root_of(load<16>(acc + c), root));
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

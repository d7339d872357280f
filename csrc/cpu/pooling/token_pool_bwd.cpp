// query_pool and weighted_pool, backward:
//   da[b, g, n] = dout[b, g] . values[b, n] + dweights[b, g, n]
//   ds = a * (da - sum over n of a * da), or da itself for weights used as given
//   dvalues[b, n, :] = sum over g of a * dout
//   dx[b, n, :] = scale * sum over g of ds * queries[g]
//   dqueries[g, :] = scale * sum over (b,) n of ds * x
//   dscores = ds
//
// in:       dout [B, G, Dv] (or slices), x [B, N, D], queries [B, G, D], values [B, N, Dv] by
//           strides, last dim contiguous; weights fp32 [B, G, N]; mask [B, N] or null
// out:      dx, dvalues, dqueries, dscores contiguous, each only if asked for; zeros where a token
//           is not allowed; rows of tokens past the cache when they are large
// numerics: fp32, rounded once; sums over tokens in blocks of 8, over chunks and images in a fixed
//           order that depends on sizes alone
// cost:     values read once for da, x once more (from cache) for dqueries; gradients written once
#include "cpu/pooling/pool.h"
#include "cpu/pooling/token_pool.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// Whether anybody asks for the gradient of the scores.
bool needs_scores(const TokenPoolBwdParams& p) {
  return p.dscores != nullptr || p.dqueries != nullptr || (p.has_queries && p.dx != nullptr);
}

// What a thread works in: the image's vectors in fp32, and what a block needs.
class Workspace {
 public:
  Workspace(const TokenPoolBwdParams& p, bool converts)
      : columns_(p.sliced ? p.width : p.groups * p.width),
        vectors_(p.groups, p.dim + p.width),
        weights_(2 * p.groups, kBlock),
        ones_(p.groups),
        block_(converts ? kBlock : 0, max_of(p.dim, p.width)) {
    if (!failed()) {
      for (int64_t g = 0; g < p.groups; ++g) ones_.get()[g] = 1.0f;
    }
  }
  bool failed() const {
    return vectors_.failed() || weights_.failed() || ones_.failed() || block_.failed();
  }
  // Queries and gradients lie one after the other, so that they spread together.
  float* queries() const { return vectors_.get(); }
  float* dout(const TokenPoolBwdParams& p) const {
    return vectors_.get() + (p.has_queries ? p.groups * p.dim : 0);
  }
  float* ds() const { return weights_.get(); }
  float* a(const TokenPoolBwdParams& p) const {
    return weights_.get() + (p.has_queries ? p.groups * kBlock : 0);
  }
  const float* ones() const { return ones_.get(); }
  float* block() const { return block_.get(); }
  int64_t columns() const { return columns_; }

 private:
  int64_t columns_;
  Scratch<float> vectors_;  // [G, D] queries, then [G, Dv] dout
  Scratch<float> weights_;  // [G, kBlock] scale * ds, then [G, kBlock] a
  Scratch<float> ones_;     // [G]
  Scratch<float> block_;    // [kBlock, D or Dv]
};

template <typename T>
void load_vectors(const TokenPoolBwdParams& p, int64_t b, const Workspace& work) {
  const int64_t slice = p.sliced ? p.width / p.groups : p.width;
  for (int64_t g = 0; g < p.groups; ++g) {
    if (p.has_queries) set_acc(work.queries() + g * p.dim, row_at<T>(p.queries, b, g), p.dim);
    set_acc(work.dout(p) + g * slice, row_at<T>(p.dout, b, g), slice);
  }
}

// da of the chunk's tokens, 0 where a token is not allowed, into ds [G, N]; and of each group the
// sum of a * da into total.
template <typename T>
void weight_gradients(const TokenPoolBwdParams& p, int64_t b, int64_t begin, int64_t end,
                      const Workspace& work, float* ds, float* total) {
  const float* const weights = p.weights + b * p.groups * p.tokens;
  const int64_t slice = p.sliced ? p.width / p.groups : p.width;
  float* const da = work.ds();
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t n = begin; n < end; ++n) ds[g * p.tokens + n] = 0.0f;
  }
  TokenBlocks blocks(p.mask, p.num_prefix, b, begin, end);
  BlockRows rows;
  while (blocks.next()) {
    const int64_t (&token)[kBlock] = blocks.block().token;
    const int count = blocks.block().count;
    block_rows<T>(p.values, b, blocks.block(), p.width, work.block(), rows);
    if (p.sliced) {
      block_dots_slices(rows, work.dout(p), p.groups, slice, da);
    } else {
      Ahead ahead(rows);
      ahead.add(p.values, b, blocks.upcoming(), T{});
      block_dots(rows, work.dout(p), p.width, p.groups, p.width, ahead, da);
    }
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int i = 0; i < count; ++i) ds[g * p.tokens + token[i]] = da[g * kBlock + i];
    }
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    float* const row = ds + g * p.tokens;
    if (p.dweights.given) {
      const float* more = row_at<float>(p.dweights, b, g);
      for (int64_t n = begin; n < end; ++n) {
        if (is_allowed(p.mask, p.num_prefix, b, n)) row[n] += more[n];
      }
    }
    const float* const a = weights + g * p.tokens;
    Pack16 sum = broadcast<16>(0.0f);
    int64_t n = begin;
    for (; n + 16 <= end; n += 16) sum = sum + load<16>(a + n) * load<16>(row + n);
    if (n < end) sum = sum + load_some<16>(a + n, end - n) * load_some<16>(row + n, end - n);
    total[g] = sum_lanes(sum);
  }
}

// da to ds, in place.
void score_gradients(const TokenPoolBwdParams& p, int64_t b, int64_t begin, int64_t end,
                     const float* total, float* ds) {
  for (int64_t g = 0; g < p.groups; ++g) {
    const float* const a = p.weights + (b * p.groups + g) * p.tokens;
    float* const row = ds + g * p.tokens;
    for (int64_t n = begin; n < end; ++n) {
      row[n] = is_allowed(p.mask, p.num_prefix, b, n) ? a[n] * (row[n] - total[g]) : 0.0f;
    }
  }
}

// The gradients of the chunk's tokens, and its sum for dqueries [G, D].
template <bool kStream, typename T>
void token_gradients(const TokenPoolBwdParams& p, int64_t b, int64_t begin, int64_t end,
                     const Workspace& work, const float* ds, float* dqueries) {
  const float* const weights = p.weights + b * p.groups * p.tokens;
  T* const dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + b * p.tokens * p.dim;
  T* const dvalues =
      p.dvalues == nullptr ? nullptr : static_cast<T*>(p.dvalues) + b * p.tokens * p.width;
  const bool into_x = p.pools_x && p.dx != nullptr;
  Spread to_x;  // dx
  to_x.dim = p.dim;
  to_x.stride = p.dim;
  to_x.vectors = work.queries();
  to_x.weights = work.ds();
  to_x.count = p.has_queries ? p.groups : 0;
  Spread to_values;  // dvalues
  to_values.dim = p.width;
  to_values.stride = p.width;
  Spread& pooled = into_x ? to_x : to_values;
  if (p.sliced) {
    pooled.slices = work.dout(p);
    pooled.slice_weights = work.a(p);
    pooled.width = p.width / p.groups;
  } else if (into_x) {
    // The gradients follow the queries, and their weights those of the queries.
    to_x.count += p.groups;
  } else {
    to_values.vectors = work.dout(p);
    to_values.weights = work.a(p);
    to_values.count = p.groups;
  }
  const auto zero_rows = [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      if (dx != nullptr) zero_row<kStream>(dx + n * p.dim, p.dim);
      if (dvalues != nullptr) zero_row<kStream>(dvalues + n * p.width, p.width);
    }
  };
  for (int64_t i = 0; dqueries != nullptr && i < p.groups * p.dim; ++i) dqueries[i] = 0.0f;
  TokenBlocks blocks(p.mask, p.num_prefix, b, begin, end);
  BlockRows rows;
  int64_t done = begin;
  while (blocks.next()) {
    const int64_t (&token)[kBlock] = blocks.block().token;
    const int count = blocks.block().count;
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int i = 0; i < count; ++i) {
        work.a(p)[g * kBlock + i] = weights[g * p.tokens + token[i]];
      }
    }
    if (p.has_queries && ds != nullptr) {
      for (int64_t g = 0; g < p.groups; ++g) {
        for (int i = 0; i < count; ++i) {
          work.ds()[g * kBlock + i] = ds[g * p.tokens + token[i]] * p.scale;
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      zero_rows(done, token[i]);
      done = token[i] + 1;
    }
    if (dqueries != nullptr) {
      block_rows<T>(p.x, b, blocks.block(), p.dim, work.block(), rows);
      Ahead ahead(rows);
      ahead.add(p.x, b, blocks.upcoming(), T{});
      block_weigh(rows, count, work.ds(), work.ones(), p.groups, p.dim, ahead, dqueries, p.dim);
    }
    if (dx != nullptr) block_spread<kStream>(to_x, blocks.block(), dx);
    if (dvalues != nullptr) block_spread<kStream>(to_values, blocks.block(), dvalues);
  }
  zero_rows(done, end);
}

template <typename T>
Status run(const TokenPoolBwdParams& p, ParallelFor parallel_for) {
  constexpr bool kConverts = !std::is_same_v<T, float>;
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
  const Chunks chunks(p.batch, p.tokens);
  const int64_t tasks = p.batch * chunks.count;
  const bool split = chunks.count > 1;
  const bool scores = needs_scores(p);
  Scratch<float> ds_scratch(scores && p.dscores == nullptr ? p.batch * p.groups : 0, p.tokens);
  Scratch<float> totals(tasks, p.groups);
  Scratch<float> partial(p.dqueries != nullptr ? tasks * p.groups : 0, p.dim);
  if (ds_scratch.failed() || totals.failed() || partial.failed()) return out_of_memory();
  float* const ds_all = p.dscores != nullptr ? p.dscores : ds_scratch.get();
  const bool streams =
      (p.dx == nullptr || may_stream(p.dx, p.batch * p.tokens * p.dim * kSize, p.dim * kSize)) &&
      (p.dvalues == nullptr ||
       may_stream(p.dvalues, p.batch * p.tokens * p.width * kSize, p.width * kSize));

  const auto first_half = [&](int64_t task, const Workspace& work) {
    const int64_t b = task / chunks.count;
    const int64_t c = task % chunks.count;
    weight_gradients<T>(p, b, chunks.begin(c), chunks.end(c), work,
                        ds_all + b * p.groups * p.tokens, totals.get() + task * p.groups);
  };
  const auto second_half = [&](int64_t task, const Workspace& work) {
    const int64_t b = task / chunks.count;
    const int64_t c = task % chunks.count;
    float* const ds = scores ? ds_all + b * p.groups * p.tokens : nullptr;
    if (scores && p.softmax) {
      score_gradients(p, b, chunks.begin(c), chunks.end(c),
                      totals.get() + b * chunks.count * p.groups, ds);
    }
    float* const dqueries =
        p.dqueries != nullptr ? partial.get() + task * p.groups * p.dim : nullptr;
    if (streams) {
      token_gradients<true, T>(p, b, chunks.begin(c), chunks.end(c), work, ds, dqueries);
    } else {
      token_gradients<false, T>(p, b, chunks.begin(c), chunks.end(c), work, ds, dqueries);
    }
  };
  int failures = 0;
  const auto for_tasks = [&](const auto& body) {
    run_parallel(parallel_for, tasks, grain_for(chunks.length * p.width * kSize),
                 [&](int64_t begin, int64_t end) {
                   const Workspace work(p, kConverts);
                   if (work.failed()) {
                     __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
                     return;
                   }
                   for (int64_t task = begin; task < end; ++task) {
                     if (task == begin || task % chunks.count == 0) {
                       load_vectors<T>(p, task / chunks.count, work);
                     }
                     body(task, work);
                   }
                 });
  };
  if (split && scores) {
    for_tasks(first_half);
    // The chunks' sums in order; the first one's place then holds the image's.
    for (int64_t b = 0; b < p.batch; ++b) {
      float* const total = totals.get() + b * chunks.count * p.groups;
      for (int64_t i = p.groups; i < chunks.count * p.groups; ++i) total[i % p.groups] += total[i];
    }
    for_tasks(second_half);
  } else {
    for_tasks([&](int64_t task, const Workspace& work) {
      if (scores) first_half(task, work);
      second_half(task, work);
    });
  }
  if (failures != 0) return out_of_memory();
  if (p.dqueries == nullptr) return Status{};
  const bool shared = p.shared_queries;
  const int64_t outputs = shared ? p.groups : p.batch * p.groups;
  const int64_t count = shared ? tasks : chunks.count;
  return sum_rows(parallel_for, outputs, count, p.dim, static_cast<T*>(p.dqueries), float{},
                  [&](int64_t o, int64_t i) -> const float* {
                    const int64_t task = shared ? i : o / p.groups * chunks.count + i;
                    return partial.get() + (task * p.groups + o % p.groups) * p.dim;
                  });
}

}  // namespace

Status token_pool_bwd(const TokenPoolBwdParams& p, ParallelFor parallel_for) {
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

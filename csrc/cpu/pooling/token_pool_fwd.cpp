// query_pool and weighted_pool, forward:
//   out[b, g, :] = sum over allowed tokens n of a[b, g, n] * values[b, n, :]
// with a the softmax of scale * queries[g] . x[n] or of given scores, or the scores as they are.
//
// in:       x [B, N, D], queries [B, G, D], scores [B, G, N], values [B, N, Dv] by strides, last
//           dim contiguous; mask [B, N] or null
// out:      out [B, G, Dv] (or a slice of Dv / G columns each) and weights [B, G, N], contiguous;
//           every element written
// numerics: fp32; softmax online over blocks of 8 tokens; out rounded once. An image's chunks are
//           combined in order; their number depends on sizes alone
// cost:     x and values read once, excluded tokens not at all; weights written twice
#include "cpu/pooling/pool.h"
#include "cpu/pooling/token_pool.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// Columns of the sums of one image: G rows of values, or one row of G slices.
int64_t sum_columns(const TokenPoolFwdParams& p) { return p.sliced ? p.width : p.groups * p.width; }

// The sums over one chunk: acc [G, columns], and of each row of scores the largest and the sum of
// exp(score - largest).
struct Partial {
  float* acc = nullptr;
  float* most = nullptr;
  float* total = nullptr;
};

constexpr int64_t kPad = 16;

// What a thread works in.
class Workspace {
 public:
  Workspace(const TokenPoolFwdParams& p, bool converts)
      : scores_(p.groups, kBlock + kPad),
        factors_(p.groups),
        queries_(p.has_queries ? p.groups : 0, p.dim),
        block_(converts ? kBlock : 0, max_of(p.dim, p.width)) {}
  bool failed() const {
    return scores_.failed() || factors_.failed() || queries_.failed() || block_.failed();
  }
  float* scores() const { return scores_.get(); }
  float* factors() const { return factors_.get(); }
  float* queries() const { return queries_.get(); }
  float* block() const { return block_.get(); }

 private:
  Scratch<float> scores_;   // [G, kBlock]
  Scratch<float> factors_;  // [G]
  Scratch<float> queries_;  // [G, D]
  Scratch<float> block_;    // [kBlock, D or Dv]
};

// Scores of a block to weights of the online softmax: scores become exp(score - largest so far),
// factors what the sums so far are worth.
MIMKERNELS_INLINE void online_softmax(int64_t groups, int count, const Partial& sums, float* scores,
                                      float* factors) {
  for (int64_t g = 0; g < groups; ++g) {
    float* s = scores + g * kBlock;
    float most = sums.most[g];
    for (int i = 0; i < count; ++i) most = s[i] > most ? s[i] : most;
    // A row of -inf so far: exp(-inf - 0) = 0.
    const float level = most == -kInfinity ? 0.0f : most;
    factors[g] = sums.most[g] - level;
    sums.most[g] = most;
    for (int i = 0; i < kBlock; ++i) s[i] = i < count ? s[i] - level : -kInfinity;
  }
  for (int64_t i = 0; i < groups * kBlock; i += kLanes) {
    store_floats(scores + i, exp_lanes(load_floats(scores + i)));
  }
  for (int64_t g = 0; g < groups; ++g) {
    const float* s = scores + g * kBlock;
    factors[g] = exp_lanes(splat(factors[g]))[0];
    const float sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    sums.total[g] = sums.total[g] * factors[g] + sum;
  }
}

template <typename T>
void pool_chunk(const TokenPoolFwdParams& p, int64_t b, int64_t begin, int64_t end,
                const Workspace& work, const Partial& sums) {
  float* const weights = p.weights + b * p.groups * p.tokens;
  float* const scores = work.scores();
  const int64_t slice = p.sliced ? p.width / p.groups : p.width;
  for (int64_t i = 0; i < sum_columns(p); ++i) sums.acc[i] = 0.0f;
  for (int64_t g = 0; g < p.groups; ++g) {
    sums.most[g] = -kInfinity;
    sums.total[g] = 0.0f;
    work.factors()[g] = 1.0f;
  }
  TokenBlocks blocks(p.mask, p.num_prefix, b, begin, end);
  BlockRows rows;
  while (blocks.next()) {
    const int64_t (&token)[kBlock] = blocks.block().token;
    const int count = blocks.block().count;
    const Rows& read = p.has_queries ? p.x : p.values;
    block_rows<T>(read, b, blocks.block(), p.has_queries ? p.dim : p.width, work.block(), rows);
    Ahead ahead(rows);
    if (!p.pools_x) ahead.add(p.values, b, blocks.block(), T{});
    ahead.add(read, b, blocks.upcoming(), T{});
    if (p.has_queries) {
      block_dots(rows, work.queries(), p.dim, p.groups, p.dim, ahead, scores);
      for (int64_t i = 0; i < p.groups * kBlock; ++i) scores[i] *= p.scale;
    } else {
      for (int64_t g = 0; g < p.groups; ++g) {
        const float* given = row_at<float>(p.scores, b, g);
        for (int i = 0; i < count; ++i) scores[g * kBlock + i] = given[token[i]];
      }
    }
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int i = 0; i < count; ++i) weights[g * p.tokens + token[i]] = scores[g * kBlock + i];
    }
    ahead.ask_heads(kRowHead);
    if (p.softmax) online_softmax(p.groups, count, sums, scores, work.factors());
    if (!p.pools_x) {
      block_rows<T>(p.values, b, blocks.block(), p.width, work.block(), rows);
    }
    if (p.sliced) {
      block_weigh_slices(rows, count, scores, work.factors(), p.groups, slice, sums.acc);
    } else {
      block_weigh(rows, count, scores, work.factors(), p.groups, p.width, ahead, sums.acc, p.width);
    }
  }
}

// weights of one image and group: exp(score - level) * inverse on allowed tokens, 0 elsewhere.
void write_weights(const TokenPoolFwdParams& p, int64_t b, float level, float inverse, float* row) {
  if (p.softmax) {
    const Floats down = splat(level);
    const Floats factor = splat(inverse);
    int64_t n = p.num_prefix;
    for (; n + kLanes <= p.tokens; n += kLanes) {
      store_floats(row + n, exp_lanes(load_floats(row + n) - down) * factor);
    }
    if (n < p.tokens) {
      Pack<kLanes> last = load_some<kLanes>(row + n, p.tokens - n);
      last.v[0] = exp_lanes(last.v[0] - down) * factor;
      store_some<kLanes>(row + n, last, p.tokens - n);
    }
  }
  for (int64_t n = 0; n < p.num_prefix; ++n) row[n] = 0.0f;
  if (!p.mask.given) return;
  for (int64_t n = p.num_prefix; n < p.tokens; ++n) {
    if (!is_allowed(p.mask, p.num_prefix, b, n)) row[n] = 0.0f;
  }
}

// The chunks' sums of one image, combined in order, and its weights.
template <typename T>
void finish(const TokenPoolFwdParams& p, int64_t b, int64_t chunks, const Partial& partial) {
  const int64_t columns = sum_columns(p);
  const int64_t row = columns / max_of(p.groups, 1);
  for (int64_t g = 0; g < p.groups; ++g) {
    float most = -kInfinity;
    for (int64_t c = 0; c < chunks; ++c) {
      const float m = partial.most[c * p.groups + g];
      most = m > most ? m : most;
    }
    const float level = most == -kInfinity ? 0.0f : most;
    float* const acc = partial.acc + g * row;
    float inverse = 1.0f;
    if (p.softmax) {
      float total = 0.0f;
      for (int64_t c = 0; c < chunks; ++c) {
        const float worth = exp_lanes(splat(partial.most[c * p.groups + g] - level))[0];
        total += partial.total[c * p.groups + g] * worth;
        if (chunks == 1) break;
        const float* part = acc + c * columns;
        for (int64_t i = 0; i < row; ++i) {
          acc[i] = c == 0 ? part[i] * worth : acc[i] + part[i] * worth;
        }
      }
      // Nothing to pool, or every score -inf: zeros.
      inverse = total == 0.0f ? 0.0f : 1.0f / total;
    } else {
      for (int64_t c = 1; c < chunks; ++c) add_to_acc(acc, acc + c * columns, row);
    }
    T* const out = static_cast<T*>(p.out) + b * columns + g * row;
    for_columns<16>(row, [&](auto size, int64_t c, int64_t n) MIMKERNELS_LAMBDA_INLINE {
      using C = decltype(size);
      store_columns<C::size, C::whole, false>(
          out + c, load_columns<C::size, C::whole>(acc + c, n) * broadcast<C::size>(inverse), n);
    });
    write_weights(p, b, level, inverse, p.weights + (b * p.groups + g) * p.tokens);
  }
}

template <typename T>
Status run(const TokenPoolFwdParams& p, ParallelFor parallel_for) {
  constexpr bool kConverts = !std::is_same_v<T, float>;
  const Chunks chunks(p.batch, p.tokens);
  const int64_t columns = sum_columns(p);
  const int64_t tasks = p.batch * chunks.count;
  // Sums of all tasks where an image has several, else of one task per thread.
  const bool split = chunks.count > 1;
  Scratch<float> all(split ? tasks : 0, columns + 2 * p.groups);
  if (all.failed()) return out_of_memory();
  const auto partial_at = [&](float* data, int64_t count) {
    return Partial{data, data + count * columns, data + count * (columns + p.groups)};
  };
  const auto of_image = [&](int64_t b) {
    return partial_at(all.get() + b * chunks.count * (columns + 2 * p.groups), chunks.count);
  };
  const int64_t read = (!p.has_queries || p.pools_x ? 0 : p.dim) + p.width;
  int failures = 0;
  run_parallel(parallel_for, tasks,
               grain_for(chunks.length * read * static_cast<int64_t>(sizeof(T))),
               [&](int64_t begin, int64_t end) {
                 const Workspace work(p, kConverts);
                 Scratch<float> mine(split ? 0 : 1, columns + 2 * p.groups);
                 if (work.failed() || mine.failed()) {
                   __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
                   return;
                 }
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t b = task / chunks.count;
                   const int64_t c = task % chunks.count;
                   if (p.has_queries && (task == begin || (p.queries.stride0 != 0 && c == 0))) {
                     for (int64_t g = 0; g < p.groups; ++g) {
                       set_acc(work.queries() + g * p.dim, row_at<T>(p.queries, b, g), p.dim);
                     }
                   }
                   Partial sums = split ? of_image(b) : partial_at(mine.get(), 1);
                   sums.acc += split ? c * columns : 0;
                   sums.most += split ? c * p.groups : 0;
                   sums.total += split ? c * p.groups : 0;
                   pool_chunk<T>(p, b, chunks.begin(c), chunks.end(c), work, sums);
                   if (!split) finish<T>(p, b, 1, sums);
                 }
               });
  if (failures != 0) return out_of_memory();
  if (split) {
    run_parallel(parallel_for, p.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) finish<T>(p, b, chunks.count, of_image(b));
    });
  }
  return Status{};
}

}  // namespace

Status token_pool_fwd(const TokenPoolFwdParams& p, ParallelFor parallel_for) {
  if (p.groups == 0) return Status{};
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

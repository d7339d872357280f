// gather_tokens, backward:
//   dx[b, n, :] = sum over (m, k) with ids[m, b, k] = n of grad[m * B + b, P + k, :]
//   dpos[n, :] = sum over b of dx[b, n, :] before rounding
//   dprefix[p, :] = sum over (m, b) of grad[m * B + b, p, :]
//
// in:       grad [M * B, P + K, D] by strides, last dim contiguous; ids int64 [M, B, K]
// out:      dx [B, N, D], dpos [N, D], dprefix [P, D] contiguous, each only if asked for
// numerics: sums in double in a fixed order (m, then k, then images), rounded once
// cost:     grad read once, dx written once, row by row through inverse lists; no atomics. With
//           dpos a thread owns tokens and walks the batch, so that the sum over it never leaves L1.
#include "cpu/inverse.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/gather_tokens/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int64_t kTile = RowSum::kTile;

// One row of dx, columns [at, at + n), and its share of dpos.
template <typename T, bool kStream>
MIMKERNELS_INLINE void scatter_row(const GatherTokensBwdParams& p, const Inverse& inverse,
                                   int64_t b, int64_t token, int64_t at, int64_t n, RowSum* sum) {
  const int64_t* offsets = inverse.offsets(b);
  const int64_t* entries = inverse.entries(b) + offsets[token];
  const int64_t count = offsets[token + 1] - offsets[token];
  const T* grad = row_at<T>(p.grad, b, p.num_prefix) + at;
  T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + (b * p.tokens + token) * p.dim + at;
  if (count == 0) {
    if (dx != nullptr) zero_row<kStream>(dx, n);
    return;
  }
  if (count == 1) {
    const T* row = grad + entries[0];
    if (dx != nullptr) copy_row<kStream>(dx, row, n);
    if (sum != nullptr) sum->add(row, n);
    return;
  }
  RowSum row;
  row.reset(n);
  for (int64_t e = 0; e < count; ++e) row.add(grad + entries[e], n);
  if (dx != nullptr) round_sums<kStream>(dx, row.total(), n);
  if (sum != nullptr) sum->add(row.total(), n);
}

template <typename T, bool kStream>
void scatter_only(const GatherTokensBwdParams& p, const Inverse& inverse, int64_t begin,
                  int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t at = 0; at < p.dim; at += kTile) {
      scatter_row<T, kStream>(p, inverse, i / p.tokens, i % p.tokens, at, min_of(kTile, p.dim - at),
                              nullptr);
    }
  }
}

template <typename T, bool kStream>
void scatter_and_sum(const GatherTokensBwdParams& p, const Inverse& inverse, int64_t begin,
                     int64_t end) {
  const int64_t tiles = ceil_div(p.dim, kTile);
  RowSum sum;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t token = task / tiles;
    const int64_t at = (task % tiles) * kTile;
    const int64_t n = min_of(kTile, p.dim - at);
    sum.reset(n);
    for (int64_t b = 0; b < p.batch; ++b) {
      if (b + 1 < p.batch) {
        const int64_t* offsets = inverse.offsets(b + 1) + token;
        if (offsets[1] > offsets[0]) {
          prefetch_row(
              row_at<T>(p.grad, b + 1, p.num_prefix) + at + inverse.entries(b + 1)[offsets[0]],
              n * static_cast<int64_t>(sizeof(T)), kWholeRow);
        }
      }
      scatter_row<T, kStream>(p, inverse, b, token, at, n, &sum);
    }
    round_sums<false>(static_cast<T*>(p.dpos) + token * p.dim + at, sum.total(), n);
  }
}

template <typename T>
Status run(const GatherTokensBwdParams& p, ParallelFor parallel_for) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  if (p.dx != nullptr || p.dpos != nullptr) {
    Inverse inverse(p.masks, p.batch, p.kept, p.tokens);
    if (inverse.failed()) return out_of_memory();
    inverse.build(parallel_for, p.ids, p.batch, p.batch * p.grad.stride0, p.grad.stride1);
    const bool streams = may_stream(p.dx, p.batch * p.tokens * row_bytes, row_bytes);
    if (p.dpos != nullptr) {
      const int64_t tiles = ceil_div(p.dim, kTile);
      run_parallel(parallel_for, p.tokens * tiles, grain_for(2 * p.batch * row_bytes),
                   [&](int64_t begin, int64_t end) {
                     if (streams) {
                       scatter_and_sum<T, true>(p, inverse, begin, end);
                     } else {
                       scatter_and_sum<T, false>(p, inverse, begin, end);
                     }
                   });
    } else {
      run_parallel(parallel_for, p.batch * p.tokens, grain_for(2 * row_bytes),
                   [&](int64_t begin, int64_t end) {
                     if (streams) {
                       scatter_only<T, true>(p, inverse, begin, end);
                     } else {
                       scatter_only<T, false>(p, inverse, begin, end);
                     }
                   });
    }
  }
  if (p.dprefix == nullptr) return Status{};
  return sum_rows(parallel_for, p.num_prefix, p.masks * p.batch, p.dim, static_cast<T*>(p.dprefix),
                  T{}, [&](int64_t prefix, int64_t i) { return row_at<T>(p.grad, i, prefix); });
}

}  // namespace

Status gather_tokens_bwd(const GatherTokensBwdParams& p, ParallelFor parallel_for) {
  const Status status = check_ids(p.ids, p.masks, p.batch, p.kept, p.tokens);
  if (!status.ok()) return status;
  if (p.dim == 0) return Status{};
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

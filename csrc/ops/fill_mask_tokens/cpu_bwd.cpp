// fill_mask_tokens, backward:
//   dx[b, n, :] = mask[b, n] ? 0 : grad[b, n, :]
//   dmask_token = sum of grad[b, n, :] over (b, n) with mask[b, n]
//
// in:       grad [B, N, D] by strides, last dim contiguous; mask bool [B, N]
// out:      dx [B, N, D], dmask_token [D] contiguous, each only if asked for
// numerics: sums in double over chunks of rows that depend on the shape alone, rounded once
// cost:     grad read once, dx written once; a thread owns chunks of rows
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/fill_mask_tokens/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int64_t kTile = RowSum::kTile;

// One chunk of rows: dx, and the sum of the masked rows into partial [D] (may be null).
template <typename T, bool kStream>
void fill_chunk(const FillMaskTokensBwdParams& p, int64_t begin, int64_t end, double* partial) {
  RowSum sum;
  for (int64_t at = 0; at < p.dim; at += kTile) {
    const int64_t n = min_of(kTile, p.dim - at);
    sum.reset(n);
    int64_t i = begin;
    for (int64_t b = begin / p.tokens; i < end; ++b) {
      const uint8_t* mask = p.mask.data + b * p.mask.stride0;
      for (int64_t token = i - b * p.tokens; token < p.tokens && i < end; ++token, ++i) {
        const T* grad = row_at<T>(p.grad, b, token) + at;
        T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + i * p.dim + at;
        if (mask[token] != 0) {
          if (dx != nullptr) zero_row<kStream>(dx, n);
          if (partial != nullptr) sum.add(grad, n);
        } else if (dx != nullptr) {
          copy_row<kStream>(dx, grad, n);
        }
      }
    }
    if (partial != nullptr) {
      memcpy(partial + at, sum.total(), static_cast<size_t>(n) * sizeof(double));
    }
  }
}

template <typename T>
Status run(const FillMaskTokensBwdParams& p, ParallelFor parallel_for) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int64_t rows = p.batch * p.tokens;
  const int64_t chunk = max_of(64, ceil_div(rows, 512));
  const int64_t chunks = ceil_div(rows, chunk);
  const bool needs_token = p.dmask_token != nullptr;
  Scratch<double> partial(needs_token ? chunks : 0, p.dim);
  if (partial.failed()) return out_of_memory();
  const bool streams = p.dx != nullptr && may_stream(p.dx, rows * row_bytes, row_bytes);
  run_parallel(parallel_for, chunks, grain_for(2 * chunk * row_bytes),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   double* sum = needs_token ? partial.get() + c * p.dim : nullptr;
                   const int64_t stop = min_of(rows, (c + 1) * chunk);
                   if (streams) {
                     fill_chunk<T, true>(p, c * chunk, stop, sum);
                   } else {
                     fill_chunk<T, false>(p, c * chunk, stop, sum);
                   }
                 }
               });
  if (!needs_token) return Status{};
  return sum_rows(parallel_for, 1, chunks, p.dim, static_cast<T*>(p.dmask_token), double{},
                  [&](int64_t, int64_t c) -> const double* { return partial.get() + c * p.dim; });
}

}  // namespace

Status fill_mask_tokens_bwd(const FillMaskTokensBwdParams& p, ParallelFor parallel_for) {
  if (p.dim == 0) return Status{};
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

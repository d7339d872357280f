// out[m * B + b, p, :] = prefix[p, :];  out[m * B + b, P + k, :] = x[b, id, :] + pos[id, :], id =
// ids[m, b, k].
//
// in:       x [B, N, D], pos [N, D], prefix [P, D] by strides, last dim contiguous; ids int64 [M,
// B, K] out:      [M * B, P + K, D] contiguous; every row written once, past the cache when it is
// large numerics: one fp32 addition, rounded once; without pos the bits are copied cost:     the
// kept rows of x read once, out written once; a thread owns a range of output rows
#include "kernels.h"
#include "rows.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

template <typename T, bool kStream>
void gather_range(const GatherTokensFwdParams& p, int64_t begin, int64_t end) {
  const int64_t rows = p.num_prefix + p.kept;
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  T* out = static_cast<T*>(p.out) + begin * p.dim;
  int64_t sequence = begin / rows;
  int64_t j = begin % rows;
  int64_t i = begin;
  while (i < end) {
    const int64_t b = sequence % p.batch;
    const int64_t* ids = p.ids.data + (sequence / p.batch) * p.ids.stride0 + b * p.ids.stride1;
    for (; j < rows && i < end; ++j, ++i, out += p.dim) {
      if (j < p.num_prefix) {
        copy_row<kStream>(out, row_at<T>(p.prefix, 0, j), p.dim);
        continue;
      }
      const int64_t k = j - p.num_prefix;
      if (k + 1 < p.kept) prefetch_row(row_at<T>(p.x, b, ids[k + 1]), row_bytes, kRowHead);
      const T* x = row_at<T>(p.x, b, ids[k]);
      if (p.pos.data != nullptr) {
        add_rows<kStream>(out, x, row_at<T>(p.pos, 0, ids[k]), p.dim);
      } else {
        copy_row<kStream>(out, x, p.dim);
      }
    }
    j = 0;
    ++sequence;
  }
}

}  // namespace

Status gather_tokens_fwd(const GatherTokensFwdParams& p, ParallelFor parallel_for) {
  const Status status = check_ids(p.ids, p.masks, p.batch, p.kept, p.tokens);
  if (!status.ok()) return status;
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
    const int64_t count = p.masks * p.batch * (p.num_prefix + p.kept);
    if (row_bytes == 0) return Status{};
    const bool streams = may_stream(p.out, count * row_bytes, row_bytes);
    run_parallel(parallel_for, count, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
      if (streams) {
        gather_range<T, true>(p, begin, end);
      } else {
        gather_range<T, false>(p, begin, end);
      }
    });
    return Status{};
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

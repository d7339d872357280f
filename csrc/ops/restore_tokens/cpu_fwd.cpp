// restore_tokens, forward, with r = ids_restore[b, i]; each plus its position if given:
//   out[b, p, :] = x[b, p, :]
//   out[b, P + i, :] = r < K ? x[b, P + r, :] : mask_token
//
// in:       x [B, P + K, D], pos [P + N, D] by strides, last dim contiguous; ids_restore int64
//           [B, N]
// out:      [B, P + N, D] contiguous; every row written once, past the cache when it is large
// numerics: one fp32 addition, rounded once; without pos the bits are copied
// cost:     x read once, out written once, pos from the cache; a thread owns a range of output rows
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/restore_tokens/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

template <typename T>
MIMKERNELS_INLINE const T* source_row(const RestoreTokensFwdParams& p, int64_t b, int64_t j) {
  if (j < p.num_prefix) return row_at<T>(p.x, b, j);
  const int64_t r = p.ids_restore.data[b * p.ids_restore.stride1 + j - p.num_prefix];
  return r < p.kept ? row_at<T>(p.x, b, p.num_prefix + r) : static_cast<const T*>(p.mask_token);
}

template <typename T, bool kStream>
void restore_range(const RestoreTokensFwdParams& p, int64_t begin, int64_t end) {
  const int64_t rows = p.num_prefix + p.tokens;
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  T* out = static_cast<T*>(p.out) + begin * p.dim;
  int64_t i = begin;
  for (int64_t b = begin / rows; i < end; ++b) {
    for (int64_t j = i - b * rows; j < rows && i < end; ++j, ++i, out += p.dim) {
      if (j + 1 < rows) prefetch_row(source_row<T>(p, b, j + 1), row_bytes, kRowHead);
      const T* source = source_row<T>(p, b, j);
      if (p.pos.given) {
        add_rows<kStream>(out, source, row_at<T>(p.pos, 0, j), p.dim);
      } else {
        copy_row<kStream>(out, source, p.dim);
      }
    }
  }
}

}  // namespace

Status restore_tokens_fwd(const RestoreTokensFwdParams& p, ParallelFor parallel_for) {
  const Status status = check_ids(p.ids_restore, 1, p.batch, p.tokens, p.tokens);
  if (!status.ok()) return status;
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
    const int64_t count = p.batch * (p.num_prefix + p.tokens);
    if (row_bytes == 0) return Status{};
    const bool streams = may_stream(p.out, count * row_bytes, row_bytes);
    run_parallel(parallel_for, count, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
      if (streams) {
        restore_range<T, true>(p, begin, end);
      } else {
        restore_range<T, false>(p, begin, end);
      }
    });
    return Status{};
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

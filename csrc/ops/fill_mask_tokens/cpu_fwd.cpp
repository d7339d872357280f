// out[b, n, :] = mask[b, n] ? mask_token : x[b, n, :].
//
// in:       x [B, N, D] by strides, last dim contiguous; mask bool [B, N]
// out:      [B, N, D] contiguous; every row written once, past the cache when it is large
// numerics: bits are copied
// cost:     the rows that stay read once, out written once; a thread owns a range of rows
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/fill_mask_tokens/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

template <typename T, bool kStream>
void fill_range(const FillMaskTokensFwdParams& p, int64_t begin, int64_t end) {
  const T* token = static_cast<const T*>(p.mask_token);
  T* out = static_cast<T*>(p.out) + begin * p.dim;
  int64_t i = begin;
  for (int64_t b = begin / p.tokens; i < end; ++b) {
    const uint8_t* mask = p.mask.data + b * p.mask.stride0;
    for (int64_t n = i - b * p.tokens; n < p.tokens && i < end; ++n, ++i, out += p.dim) {
      copy_row<kStream>(out, mask[n] != 0 ? token : row_at<T>(p.x, b, n), p.dim);
    }
  }
}

}  // namespace

Status fill_mask_tokens_fwd(const FillMaskTokensFwdParams& p, ParallelFor parallel_for) {
  return with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
    const int64_t count = p.batch * p.tokens;
    if (row_bytes == 0) return Status{};
    const bool streams = may_stream(p.out, count * row_bytes, row_bytes);
    run_parallel(parallel_for, count, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
      if (streams) {
        fill_range<T, true>(p, begin, end);
      } else {
        fill_range<T, false>(p, begin, end);
      }
    });
    return Status{};
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

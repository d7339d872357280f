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

// Rows copied side by side: one row alone leaves memory waiting for its first lines.
constexpr int kGroup = 4;

// kGroup rows of x (plus pos, unless null) to consecutive rows past the cache.
template <typename T>
MIMKERNELS_INLINE void stream_group(T* out, const T* const (&x)[kGroup],
                                    const T* const (&pos)[kGroup], int64_t dim) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  if (pos[0] == nullptr) {
    for (int64_t i = 0; i < dim; i += kLine) {
      MIMKERNELS_UNROLL
      for (int r = 0; r < kGroup; ++r) copy_row<true>(out + r * dim + i, x[r] + i, kLine);
    }
  } else {
    for (int64_t i = 0; i < dim; i += kLine) {
      MIMKERNELS_UNROLL
      for (int r = 0; r < kGroup; ++r) {
        add_rows<true>(out + r * dim + i, x[r] + i, pos[r] + i, kLine);
      }
    }
  }
}

template <typename T, bool kStream>
void gather_range(const GatherTokensFwdParams& p, int64_t begin, int64_t end) {
  const int64_t rows = p.num_prefix + p.kept;
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  T* out = static_cast<T*>(p.out) + begin * p.dim;
  for (int64_t i = begin; i < end;) {
    const int64_t sequence = i / rows;
    const int64_t b = sequence % p.batch;
    const int64_t* ids = p.ids.data + (sequence / p.batch) * p.ids.stride0 + b * p.ids.stride1;
    const int64_t stop = min_of(rows, i % rows + end - i);
    const auto x = [&](int64_t j) { return row_at<T>(p.x, b, ids[j - p.num_prefix]); };
    const auto pos = [&](int64_t j) -> const T* {
      return p.pos.data == nullptr ? nullptr : row_at<T>(p.pos, 0, ids[j - p.num_prefix]);
    };
    const auto ask_for = [&](int64_t j) {
      if (j < stop) prefetch_row(x(j), row_bytes, kRowHead);
    };
    int64_t j = i % rows;
    i += stop - j;
    for (; j < min_of(stop, p.num_prefix); ++j, out += p.dim) {
      copy_row<kStream>(out, row_at<T>(p.prefix, 0, j), p.dim);
    }
    if constexpr (kStream) {
      for (; j + kGroup <= stop; j += kGroup, out += kGroup * p.dim) {
        const T* from[kGroup];
        const T* plus[kGroup];
        for (int r = 0; r < kGroup; ++r) {
          ask_for(j + kGroup + r);
          from[r] = x(j + r);
          plus[r] = pos(j + r);
        }
        stream_group(out, from, plus, p.dim);
      }
    }
    for (; j < stop; ++j, out += p.dim) {
      ask_for(j + 1);
      if (p.pos.data != nullptr) {
        add_rows<kStream>(out, x(j), pos(j), p.dim);
      } else {
        copy_row<kStream>(out, x(j), p.dim);
      }
    }
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

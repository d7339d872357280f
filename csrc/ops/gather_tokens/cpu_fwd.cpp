// gather_tokens, forward:
//   out[m * B + b, p, :] = prefix[p, :]
//   out[m * B + b, P + k, :] = x[b, i, :] + pos[i, :] with i = ids[m, b, k]
//
// in:       x [B, N, D], pos [N, D], prefix [P, D] by strides, last dim contiguous; ids int64
//           [M, B, K]
// out:      [M * B, P + K, D] contiguous; every row written once, past the cache when it is large
// numerics: one fp32 addition, rounded once; without pos the bits are copied
// cost:     the kept rows of x read once, out written once; a thread owns a range of output rows
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/gather_tokens/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// Rows copied side by side: one row alone leaves memory waiting for its first lines.
constexpr int kGroup = 4;

// Where one output row comes from; pos is null where nothing is added.
template <typename T>
struct Source {
  const T* row;
  const T* pos;
};

// Walks the sources of output rows, whatever sequence they belong to.
template <typename T>
class Sources {
 public:
  Sources(const GatherTokensFwdParams& p, int64_t first)
      : p_(p),
        rows_(p.num_prefix + p.kept),
        sequence_(first / rows_),
        place_(first % rows_ - p.num_prefix) {
    open();
  }

  MIMKERNELS_INLINE Source<T> next() {
    if (place_ == p_.kept) {
      place_ = -p_.num_prefix;
      ++sequence_;
      open();
    }
    const int64_t k = place_++;
    if (k < 0) return {row_at<T>(p_.prefix, 0, p_.num_prefix + k), nullptr};
    return {row_at<T>(p_.x, image_, ids_[k]),
            p_.pos.given ? row_at<T>(p_.pos, 0, ids_[k]) : nullptr};
  }

 private:
  MIMKERNELS_INLINE void open() {
    image_ = sequence_ % p_.batch;
    ids_ = p_.ids.data + sequence_ / p_.batch * p_.ids.stride0 + image_ * p_.ids.stride1;
  }

  const GatherTokensFwdParams& p_;
  int64_t rows_;
  int64_t sequence_;
  int64_t place_;  // below 0: a prefix token
  int64_t image_ = 0;
  const int64_t* ids_ = nullptr;
};

template <bool kStream, typename T>
MIMKERNELS_INLINE void put_row(T* out, const Source<T>& from, int64_t at, int64_t n) {
  if (from.pos == nullptr) {
    copy_row<kStream>(out + at, from.row + at, n);
  } else {
    add_rows<kStream>(out + at, from.row + at, from.pos + at, n);
  }
}

template <typename T, bool kStream>
void gather_range(const GatherTokensFwdParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  T* out = static_cast<T*>(p.out) + begin * p.dim;
  Sources<T> sources(p, begin);
  Source<T> next[kGroup];
  for (int r = 0; r < kGroup && begin + r < end; ++r) next[r] = sources.next();
  int64_t i = begin;
  if constexpr (kStream) {
    // Line by line, each asks for the same line of the next group: all at once, they would be
    // waited for.
    for (; i + kGroup <= end; i += kGroup, out += kGroup * p.dim) {
      Source<T> from[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        from[r] = next[r];
        if (i + kGroup + r < end) next[r] = sources.next();
      }
      for (int64_t c = 0; c < p.dim; c += kLine) {
        MIMKERNELS_UNROLL
        for (int r = 0; r < kGroup; ++r) {
          prefetch(next[r].row + c);
          put_row<true>(out + r * p.dim, from[r], c, kLine);
        }
      }
    }
  }
  for (; i < end; ++i, out += p.dim) {
    const Source<T> from = next[0];
    for (int r = 0; r + 1 < kGroup; ++r) next[r] = next[r + 1];
    if (i + kGroup < end) next[kGroup - 1] = sources.next();
    if (i + 1 < end) prefetch_row(next[0].row, row_bytes, kRowHead);
    put_row<kStream>(out, from, 0, p.dim);
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

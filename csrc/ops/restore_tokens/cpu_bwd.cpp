// restore_tokens, backward:
//   dx[b, p, :] = grad[b, p, :]
//   dx[b, P + r, :] = sum over i with ids_restore[b, i] = r < K of grad[b, P + i, :]
//   dmask_token = sum over (b, i) with ids_restore[b, i] >= K of grad[b, P + i, :]
//   dpos = sum over b of grad[b]
//
// in:       grad [B, P + N, D] by strides, last dim contiguous; ids_restore int64 [B, N], any ids
//           in [0, N)
// out:      dx [B, P + K, D], dmask_token [D], dpos [P + N, D] contiguous, each only if asked for
// numerics: sums in double in a fixed order (images, then positions), rounded once
// cost:     grad read once. With a sum over the batch a thread owns positions and walks the batch;
//           rows of a permutation are handed to dx on the way, others through inverse lists.
#include "cpu/inverse.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/restore_tokens/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int64_t kTile = RowSum::kTile;

// Sums over the batch at one position; copies rows to dx where each is used at most once.
template <typename T, bool kStream>
void sum_positions(const RestoreTokensBwdParams& p, bool copies_x, double* mask_partial,
                   int64_t begin, int64_t end) {
  const int64_t tiles = ceil_div(p.dim, kTile);
  T* dx = static_cast<T*>(p.dx);
  RowSum masked;
  RowSum visible;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t j = task / tiles;
    const int64_t at = (task % tiles) * kTile;
    const int64_t n = min_of(kTile, p.dim - at);
    masked.reset(n);
    visible.reset(n);
    for (int64_t b = 0; b < p.batch; ++b) {
      const T* grad = row_at<T>(p.grad, b, j) + at;
      if (b + 1 < p.batch)
        prefetch_row(grad + p.grad.stride0, n * static_cast<int64_t>(sizeof(T)), kWholeRow);
      const int64_t i = j - p.num_prefix;
      const int64_t r = i < 0 ? i : p.ids_restore.data[b * p.ids_restore.stride1 + i];
      if (r >= p.kept) {
        masked.add(grad, n);
        continue;
      }
      if (copies_x) {
        copy_row<kStream>(dx + (b * (p.num_prefix + p.kept) + p.num_prefix + r) * p.dim + at, grad,
                          n);
      }
      if (p.dpos != nullptr) visible.add(grad, n);
    }
    if (mask_partial != nullptr && j >= p.num_prefix) {
      memcpy(mask_partial + (j - p.num_prefix) * p.dim + at, masked.total(),
             static_cast<size_t>(n) * sizeof(double));
    }
    if (p.dpos != nullptr) {
      visible.add(masked.total(), n);
      round_sums<false>(static_cast<T*>(p.dpos) + j * p.dim + at, visible.total(), n);
    }
  }
}

// Rows of dx from the inverse lists. only_unused: the others have been written already.
template <typename T, bool kStream>
void gather_rows(const RestoreTokensBwdParams& p, const Inverse& inverse, bool only_unused,
                 int64_t begin, int64_t end) {
  const int64_t rows = p.num_prefix + p.kept;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / rows;
    const int64_t r = row % rows - p.num_prefix;
    T* dx = static_cast<T*>(p.dx) + row * p.dim;
    if (r < 0) {
      if (!only_unused) copy_row<kStream>(dx, row_at<T>(p.grad, b, r + p.num_prefix), p.dim);
      continue;
    }
    const int64_t* offsets = inverse.offsets(b) + r;
    const int64_t* entries = inverse.entries(b) + offsets[0];
    const int64_t count = offsets[1] - offsets[0];
    const T* grad = row_at<T>(p.grad, b, p.num_prefix);
    if (count == 0) {
      zero_row<kStream>(dx, p.dim);
    } else if (only_unused) {
      continue;
    } else if (count == 1) {
      copy_row<kStream>(dx, grad + entries[0], p.dim);
    } else {
      RowSum sum;
      for (int64_t at = 0; at < p.dim; at += kTile) {
        const int64_t n = min_of(kTile, p.dim - at);
        sum.reset(n);
        for (int64_t e = 0; e < count; ++e) sum.add(grad + entries[e] + at, n);
        round_sums<kStream>(dx + at, sum.total(), n);
      }
    }
  }
}

struct Usage {
  bool repeated = false;
  bool unused = false;
};

MIMKERNELS_INLINE Usage usage_of(const Inverse& inverse, int64_t batch, int64_t kept) {
  Usage usage;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* offsets = inverse.offsets(b);
    for (int64_t r = 0; r < kept; ++r) {
      usage.repeated |= offsets[r + 1] - offsets[r] > 1;
      usage.unused |= offsets[r + 1] == offsets[r];
    }
  }
  return usage;
}

template <typename T>
Status run(const RestoreTokensBwdParams& p, ParallelFor parallel_for) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int64_t positions = p.num_prefix + p.tokens;
  const int64_t x_rows = p.batch * (p.num_prefix + p.kept);
  const bool needs_x = p.dx != nullptr;
  const bool needs_sums = p.dmask_token != nullptr || p.dpos != nullptr;
  const bool streams = needs_x && may_stream(p.dx, x_rows * row_bytes, row_bytes);

  Inverse inverse(1, needs_x ? p.batch : 0, p.tokens, p.kept);
  Scratch<double> mask_partial(p.dmask_token != nullptr ? p.tokens : 0, p.dim);
  if (inverse.failed() || mask_partial.failed()) return out_of_memory();
  Usage usage;
  if (needs_x) {
    inverse.build(parallel_for, p.ids_restore, p.batch, 0, p.grad.stride1);
    usage = usage_of(inverse, p.batch, p.kept);
  }
  const bool copies_x = needs_x && needs_sums && !usage.repeated;

  if (needs_sums) {
    double* partial = p.dmask_token != nullptr ? mask_partial.get() : nullptr;
    run_parallel(parallel_for, positions * ceil_div(p.dim, kTile), grain_for(p.batch * row_bytes),
                 [&](int64_t begin, int64_t end) {
                   if (streams) {
                     sum_positions<T, true>(p, copies_x, partial, begin, end);
                   } else {
                     sum_positions<T, false>(p, copies_x, partial, begin, end);
                   }
                 });
  }
  if (p.dmask_token != nullptr) {
    const Status status = sum_rows(
        parallel_for, 1, p.tokens, p.dim, static_cast<T*>(p.dmask_token), double{},
        [&](int64_t, int64_t i) -> const double* { return mask_partial.get() + i * p.dim; });
    if (!status.ok()) return status;
  }
  if (!needs_x || (copies_x && !usage.unused)) return Status{};
  run_parallel(parallel_for, x_rows, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
    if (streams) {
      gather_rows<T, true>(p, inverse, copies_x, begin, end);
    } else {
      gather_rows<T, false>(p, inverse, copies_x, begin, end);
    }
  });
  return Status{};
}

}  // namespace

Status restore_tokens_bwd(const RestoreTokensBwdParams& p, ParallelFor parallel_for) {
  const Status status = check_ids(p.ids_restore, 1, p.batch, p.tokens, p.tokens);
  if (!status.ok()) return status;
  if (p.dim == 0) return Status{};
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

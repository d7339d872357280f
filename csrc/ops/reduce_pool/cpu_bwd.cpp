// reduce_pool, backward, over the allowed tokens; z = max(x, eps), M the mean of z^p:
//   mean        dx[b, n, c] = dout[b, c] / count
//   maximum     dx[b, n, c] = dout[b, c] at the column's token, else 0
//   power mean  dx[b, n, c] = dout[b, c] * M^(1/p - 1) * z^(p - 1) / count, 0 where x < eps
//               dp = sum over (b, c) of dout * M^(1/p) * (mean of z^p log z / M - log M / p) / p
//               both without the columns whose M is 0
//
// in:       dout [B, D], x [B, N, D] (power mean only) by strides, last dim contiguous; mask [B, N]
//           or null; token or M of the forward
// out:      dx [B, N, D] contiguous, zeros where a token is not allowed, past the cache when it is
//           large; dp [1]; each only if asked for
// numerics: fp32, rounded once; dp summed in double over columns, tiles and images in order
// cost:     dx written once; x read once for the power mean
#include "cpu/kernels.h"
#include "ops/reduce_pool/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// One image's columns [first, first + dim); pointers are at the first column.
template <typename T>
struct Tile {
  const ReducePoolParams& p;
  int64_t b;
  int64_t first;
  int64_t dim;
  const T* dout;
  int64_t count;  // of allowed tokens

  T* dx(int64_t n) const { return static_cast<T*>(p.dx) + (b * p.tokens + n) * p.dim + first; }
  bool allowed(int64_t n) const { return is_allowed(p.mask, p.num_prefix, b, n); }
};

template <bool kStream, typename T>
void mean_gradient(const Tile<T>& t) {
  alignas(64) T row[kReduceTile];
  alignas(64) float acc[kReduceTile];
  set_acc(acc, t.dout, t.dim);
  const float count = static_cast<float>(t.count);
  for (int64_t c = 0; c < t.dim; ++c) acc[c] /= count;
  round_acc<false>(row, acc, t.dim);
  for (int64_t n = 0; n < t.p.tokens; ++n) {
    if (t.allowed(n)) {
      copy_row<kStream>(t.dx(n), row, t.dim);
    } else {
      zero_row<kStream>(t.dx(n), t.dim);
    }
  }
}

template <bool kStream, typename T>
void max_gradient(const Tile<T>& t) {
  using I = Pack16::Vec::I;
  alignas(64) float dout[kReduceTile + 16];
  alignas(64) int32_t index[kReduceTile + 16];
  set_acc(dout, t.dout, t.dim);
  memcpy(index, t.p.index + t.b * t.p.dim + t.first, static_cast<size_t>(t.dim) * sizeof(int32_t));
  for (int64_t n = 0; n < t.p.tokens; ++n) {
    T* const dx = t.dx(n);
    const auto at = [&](int64_t c, int64_t some, auto whole) MIMKERNELS_LAMBDA_INLINE {
      Pack16 value = load<16>(dout + c);
      I from[Pack16::kParts];
      memcpy(from, index + c, sizeof(from));
      MIMKERNELS_UNROLL
      for (int v = 0; v < Pack16::kParts; ++v) {
        value.v[v] = from[v] == static_cast<int32_t>(n) ? value.v[v] : Pack16::Vec::F{};
      }
      store_columns<16, decltype(whole)::value, kStream>(dx + c, value, some);
    };
    int64_t c = 0;
    for (; c + 16 <= t.dim; c += 16) at(c, 16, std::true_type{});
    if (c < t.dim) at(c, t.dim - c, std::false_type{});
  }
}

// Returns the tile's share of dp.
template <bool kStream, typename T>
double power_gradient(const Tile<T>& t) {
  alignas(64) float factor[kReduceTile + 16];  // of z^(p - 1)
  alignas(64) float center[kReduceTile + 16];  // log M / p
  alignas(64) float logs[kReduceTile + 16];    // sum of z^p (log z - log M / p)
  alignas(64) float run[kReduceTile + 16];     // that of the last tokens
  alignas(64) float dout[kReduceTile + 16];
  const float exponent = *t.p.p;
  const float* const moment = t.p.moment + t.b * t.p.dim + t.first;
  const Pack16 eps = broadcast<16>(t.p.eps);
  const Power less(exponent - 1.0f);
  const Power root(1.0f / exponent);
  const Power slope(1.0f / exponent - 1.0f);
  const Pack16 by = broadcast<16>(exponent);
  const Pack16 count = broadcast<16>(static_cast<float>(max_of(t.count, 1)));
  memset(dout, 0, sizeof(dout));
  memset(factor, 0, sizeof(factor));
  memset(logs, 0, sizeof(logs));
  memset(run, 0, sizeof(run));
  set_acc(dout, t.dout, t.dim);
  set_acc(factor, moment, t.dim);
  for (int64_t c = 0; c < t.dim; c += 16) {
    // M^(1/p - 1) = M^(1/p) / M, rounded less, where M is finite.
    const Pack16 moment = load<16>(factor + c);
    const Pack16 m = unless_zero(moment, moment, broadcast<16>(1.0f));
    const Pack16 log_root = log_of(m) / by;
    store<16>(center + c, log_root);
    const Pack16 power =
        where_less(m, broadcast<16>(kInfinity), pow_of(m, root) / m, pow_of(m, slope));
    const Pack16 slopes = load<16>(dout + c) * power / count;
    store<16>(factor + c, unless_zero(moment, slopes, broadcast<16>(0.0f)));
  }
  for (int64_t n = 0; n < t.p.tokens; ++n) {
    if (n % kSumRun == 0) close_run(logs, run, t.dim);
    T* const dx = t.p.dx == nullptr ? nullptr : t.dx(n);
    if (!t.allowed(n)) {
      if (dx != nullptr) zero_row<kStream>(dx, t.dim);
      continue;
    }
    const T* const x = row_at<T>(t.p.x, t.b, n) + t.first;
    const auto at = [&](int64_t c, int64_t some, auto whole) MIMKERNELS_LAMBDA_INLINE {
      constexpr bool kWhole = decltype(whole)::value;
      const Pack16 value = load_columns<16, kWhole>(x + c, some);
      const Pack16 z = at_least(value, eps);
      const bool cube = exponent == 3.0f;
      Pack16 log_z = broadcast<16>(0.0f);
      if (t.p.dp != nullptr) log_z = log_of(z);
      const Pack16 power = cube ? z * z : pow_of(z, less);
      if (t.p.dp != nullptr)
        store<16>(run + c, load<16>(run + c) + power * z * (log_z - load<16>(center + c)));
      if (dx == nullptr) return;
      // NaN is not less than eps and gets its gradient, NaN.
      const Pack16 out = where_less(value, eps, broadcast<16>(0.0f), load<16>(factor + c) * power);
      store_columns<16, kWhole, kStream>(dx + c, out, some);
    };
    int64_t c = 0;
    for (; c + 16 <= t.dim; c += 16) at(c, 16, std::true_type{});
    if (c < t.dim) at(c, t.dim - c, std::false_type{});
  }
  close_run(logs, run, t.dim);
  if (t.p.dp == nullptr || t.count == 0) return 0.0;
  double sum = 0.0;
  for (int64_t c = 0; c < t.dim; ++c) {
    // factor is dout * M^(1/p - 1) / count
    sum += static_cast<double>(factor[c]) * logs[c];
  }
  return sum / exponent;
}

template <bool kStream, typename T>
double gradient(const Tile<T>& t) {
  switch (t.p.kind) {
    case ReduceKind::kMean:
      mean_gradient<kStream>(t);
      return 0.0;
    case ReduceKind::kMax:
      max_gradient<kStream>(t);
      return 0.0;
    case ReduceKind::kGem:
      return power_gradient<kStream>(t);
  }
  return 0.0;
}

template <typename T>
Status run(const ReducePoolParams& p, ParallelFor parallel_for) {
  const ReduceTasks tasks(p);
  Scratch<double> dp(p.dp != nullptr ? tasks.count : 0);
  if (dp.failed()) return out_of_memory();
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const bool streams =
      p.dx != nullptr && may_stream(p.dx, p.batch * p.tokens * row_bytes, row_bytes);
  run_parallel(parallel_for, tasks.count, grain_for(p.tokens * min_of(tasks.tile * 4, row_bytes)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t b = tasks.image(task);
                   const int64_t first = tasks.first(task);
                   const Tile<T> tile{p,
                                      b,
                                      first,
                                      tasks.columns(task),
                                      row_at<T>(p.dout, 0, b) + first,
                                      count_allowed(p, b)};
                   const double share = streams ? gradient<true>(tile) : gradient<false>(tile);
                   if (p.dp != nullptr) dp.get()[task] = share;
                 }
               });
  if (p.dp == nullptr) return Status{};
  double total = 0.0;
  for (int64_t task = 0; task < tasks.count; ++task) total += dp.get()[task];
  *p.dp = static_cast<float>(total);
  return Status{};
}

}  // namespace

Status reduce_pool_bwd(const ReducePoolParams& p, ParallelFor parallel_for) {
  if (p.dx == nullptr && p.dp == nullptr) return Status{};
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

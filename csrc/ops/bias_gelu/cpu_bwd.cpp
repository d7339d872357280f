// dx[i, :] = grad[i, :] * gelu'(x[i, :] + bias);  dbias = sum of dx[i, :] over i, before rounding.
//
// in:       grad, x [A, R, E] by strides, last dim contiguous; bias [E] in x's dtype, fp32 or
//           absent
// out:      dx [A, R, E], dbias [E] contiguous, each only if asked for
// numerics: fp32; sums over chunks of at most 32 rows, which depend on the shape alone, are added
//           in double and rounded once
// cost:     grad and x read once, dx written once; a thread owns chunks of rows, whose sums stay in
//           its first-level cache while it works on them
#include "cpu/kernels.h"
#include "ops/bias_gelu/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// One row: dx, and its sum into acc; either may be null.
template <typename T, bool kTanh, bool kStream>
void gelu_row(T* dx, float* acc, const T* grad, const T* x, const float* bias, int64_t dim) {
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {
    const Floats slope = gelu_slope<kTanh>(load_part<kLanes>(x + j) + load_floats(bias + j));
    const Floats d = load_part<kLanes>(grad + j) * slope;
    if (dx != nullptr) put<kStream>(dx + j, Pack<kLanes>{{d}});
    if (acc != nullptr) store_floats(acc + j, load_floats(acc + j) + d);
  }
  const int64_t rest = dim - j;
  if (rest == 0) return;
  const Pack<kLanes> sum = load_some<kLanes>(x + j, rest) + load_some<kLanes>(bias + j, rest);
  const Pack<kLanes> d =
      load_some<kLanes>(grad + j, rest) * Pack<kLanes>{{gelu_slope<kTanh>(sum.v[0])}};
  if (dx != nullptr) store_some<kLanes>(dx + j, d, rest);
  if (acc != nullptr) store_some<kLanes>(acc + j, load_some<kLanes>(acc + j, rest) + d, rest);
}

template <typename T, bool kTanh>
Status run(const BiasGeluBwdParams& p, ParallelFor parallel_for) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int64_t rows = p.batch * p.tokens;
  // Few rows, so that every thread has some and no sum in fp32 is long.
  const int64_t chunk = min_of(32, max_of(8, rows / 64));
  const int64_t chunks = ceil_div(rows, chunk);
  const bool needs_bias = p.dbias != nullptr;
  Scratch<float> bias(p.dim);
  Scratch<float> partial(needs_bias ? chunks : 0, p.dim);
  if (bias.failed() || partial.failed()) return out_of_memory();
  widen_bias(bias.get(), p.has_bias, p.bias, p.bias_dtype, p.dim);
  const bool streams = p.dx != nullptr && may_stream(p.dx, rows * row_bytes, row_bytes);
  run_parallel(parallel_for, chunks, grain_for(3 * chunk * row_bytes),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   float* acc = needs_bias ? partial.get() + c * p.dim : nullptr;
                   if (acc != nullptr) zero_row<false>(acc, p.dim);
                   for (int64_t i = c * chunk; i < min_of(rows, (c + 1) * chunk); ++i) {
                     const T* grad = row_at<T>(p.grad, i / p.tokens, i % p.tokens);
                     const T* x = row_at<T>(p.x, i / p.tokens, i % p.tokens);
                     T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + i * p.dim;
                     if (streams) {
                       gelu_row<T, kTanh, true>(dx, acc, grad, x, bias.get(), p.dim);
                     } else {
                       gelu_row<T, kTanh, false>(dx, acc, grad, x, bias.get(), p.dim);
                     }
                   }
                 }
               });
  if (!needs_bias) return Status{};
  return with_float_type(p.bias_dtype, [&](auto type) {
    return sum_rows(parallel_for, 1, chunks, p.dim, static_cast<decltype(type)*>(p.dbias), float{},
                    [&](int64_t, int64_t c) -> const float* { return partial.get() + c * p.dim; });
  });
}

}  // namespace

Status bias_gelu_bwd(const BiasGeluBwdParams& p, ParallelFor parallel_for) {
  if (p.dim == 0) return Status{};
  return with_gelu_type(p.dtype, p.tanh, [&](auto type, auto tanh) {
    return run<decltype(type), tanh.value>(p, parallel_for);
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

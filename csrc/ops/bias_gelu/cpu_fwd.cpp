// out[i, :] = gelu(x[i, :] + bias).
//
// in:       x [A, R, E] by strides, last dim contiguous; bias [E] in x's dtype, fp32 or absent
// out:      [A, R, E] contiguous; every row written once, past the cache when it is large
// numerics: added and evaluated in fp32, rounded once; instruction sets differ in the last bits
// cost:     x read once, out written once; a thread owns a range of rows
#include "cpu/kernels.h"
#include "ops/bias_gelu/cpu.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

template <typename T, bool kTanh, bool kStream>
void gelu_row(T* out, const T* x, const float* bias, int64_t dim) {
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {
    const Floats y = gelu<kTanh>(load_part<kLanes>(x + j) + load_floats(bias + j));
    put<kStream>(out + j, Pack<kLanes>{{y}});
  }
  if (j < dim) {
    const Pack<kLanes> sum =
        load_some<kLanes>(x + j, dim - j) + load_some<kLanes>(bias + j, dim - j);
    store_some<kLanes>(out + j, Pack<kLanes>{{gelu<kTanh>(sum.v[0])}}, dim - j);
  }
}

template <typename T, bool kTanh>
Status run(const BiasGeluFwdParams& p, ParallelFor parallel_for) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  const int64_t rows = p.batch * p.tokens;
  Scratch<float> bias(p.dim);
  if (bias.failed()) return out_of_memory();
  widen_bias(bias.get(), p.has_bias, p.bias, p.bias_dtype, p.dim);
  const bool streams = may_stream(p.out, rows * row_bytes, row_bytes);
  run_parallel(parallel_for, rows, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = row_at<T>(p.x, i / p.tokens, i % p.tokens);
      T* out = static_cast<T*>(p.out) + i * p.dim;
      if (streams) {
        gelu_row<T, kTanh, true>(out, x, bias.get(), p.dim);
      } else {
        gelu_row<T, kTanh, false>(out, x, bias.get(), p.dim);
      }
    }
  });
  return Status{};
}

}  // namespace

Status bias_gelu_fwd(const BiasGeluFwdParams& p, ParallelFor parallel_for) {
  if (p.dim == 0) return Status{};
  return with_gelu_type(p.dtype, p.tanh, [&](auto type, auto tanh) {
    return run<decltype(type), tanh.value>(p, parallel_for);
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

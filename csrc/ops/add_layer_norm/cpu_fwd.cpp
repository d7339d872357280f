// residual[i, :] = x[i, :] + drop * scale * y[i, :];  out[i, :] = LayerNorm(residual[i, :]).
//
// in:       x, y [A, R, C] by strides, last dim contiguous; y may have 16 bits beside fp32 x, or be
//           absent; weight, bias, scale [C] and drop [A] fp32, each may be absent
// out:      residual [A, R, C] of x's dtype, if there is y; out [A, R, C]; mean and rstd fp32
//           [A, R]; contiguous; large ones are written past the cache
// numerics: fp32; the residual is rounded before it is normalised. The mean is corrected by the
//           mean of the deviations from it, and the variance, taken from the same deviations, by
//           its square: both are right to the last places however far the row is from 0, and all
//           deviations of a row of equal numbers are 0
// cost:     x and y read once, residual and out written once; what is read again of a row is in the
//           first-level cache; a thread owns a range of rows
#include "cpu/kernels.h"
#include "cpu/row_statistics.h"
#include "ops/add_layer_norm/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// A row that goes past the cache is kept here while it is normalised; longer ones do not.
constexpr int64_t kRowBytes = 16384;

// row = x + factor * scale * y, rounded; the sum of the row.
template <typename T, typename U>
float add_branch(T* row, const T* x, const U* y, const float* scale, float factor, int64_t n) {
  const Pack16 factors = broadcast<16>(factor);
  Pack16 sum = broadcast<16>(0.0f);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    const Pack16 by = scale == nullptr ? factors : factors * load<16>(scale + j);
    const Pack16 value = load<16>(x + j) + by * load<16>(y + j);
    store<16>(row + j, value);
    if constexpr (std::is_same_v<T, float>) {
      sum = sum + value;
    } else {
      sum = sum + load<16>(row + j);
    }
  }
  if (j < n) {
    const int64_t rest = n - j;
    const Pack16 by = scale == nullptr ? factors : factors * load_some<16>(scale + j, rest);
    const Pack16 value = load_some<16>(x + j, rest) + by * load_some<16>(y + j, rest);
    store_some<16>(row + j, value, rest);
    sum = sum + load_some<16>(row + j, rest);
  }
  return sum_lanes(sum);
}

template <bool kStream, typename O, typename T>
void normalise(O* out, const T* row, Statistics of, const float* weight, const float* bias,
               int64_t n) {
  const Pack16 mean = broadcast<16>(of.mean);
  const Pack16 rstd = broadcast<16>(of.rstd);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    const Pack16 normal = (load<16>(row + j) - mean) * rstd;
    put<kStream>(out + j, normal * load<16>(weight + j) + load<16>(bias + j));
  }
  if (j < n) {
    const int64_t rest = n - j;
    const Pack16 normal = (load_some<16>(row + j, rest) - mean) * rstd;
    const Pack16 value = normal * load_some<16>(weight + j, rest) + load_some<16>(bias + j, rest);
    store_some<16>(out + j, value, rest);
  }
}

template <typename T>
Status run(const AddLayerNormFwdParams& p, ParallelFor parallel_for) {
  const int64_t n = p.dim;
  const int64_t rows = p.batch * p.tokens;
  const int64_t row_bytes = n * static_cast<int64_t>(sizeof(T));
  const int64_t out_bytes = n * (p.out_dtype == DType::kFloat32 ? 4 : 2);
  Scratch<float> ones(p.has_weight ? 0 : n);
  Scratch<float> zeros(p.has_bias ? 0 : n);
  if (ones.failed() || zeros.failed()) return out_of_memory();
  for (int64_t j = 0; !p.has_weight && j < n; ++j) ones.get()[j] = 1.0f;
  // The zero whose addition changes no bit.
  for (int64_t j = 0; !p.has_bias && j < n; ++j) zeros.get()[j] = -0.0f;
  const float* const weight = p.has_weight ? p.weight : ones.get();
  const float* const bias = p.has_bias ? p.bias : zeros.get();
  const bool streams_residual =
      p.y.given && row_bytes <= kRowBytes && may_stream(p.residual, rows * row_bytes, row_bytes);
  const bool streams_out = may_stream(p.out, rows * out_bytes, out_bytes);

  const auto normalise_row = [&](int64_t i, const T* row, float sum) {
    const Statistics of = statistics_of(row, sum, p.eps, n);
    p.mean[i] = of.mean;
    p.rstd[i] = of.rstd;
    return with_float_type(p.out_dtype, [&](auto type) {
      auto* const out = static_cast<decltype(type)*>(p.out) + i * n;
      if (streams_out) {
        normalise<true>(out, row, of, weight, bias, n);
      } else {
        normalise<false>(out, row, of, weight, bias, n);
      }
      return Status{};
    });
  };
  const auto add_row = [&](int64_t i, T* kept) {
    const int64_t image = i / p.tokens;
    const int64_t token = i % p.tokens;
    T* const residual = static_cast<T*>(p.residual) + i * n;
    T* const row = streams_residual ? kept : residual;
    const T* const x = row_at<T>(p.x, image, token);
    const float factor = p.has_drop ? p.drop[image] : 1.0f;
    const float* const scale = p.has_scale ? p.scale : nullptr;
    float sum = 0.0f;
    const auto add = [&](auto type) {
      sum = add_branch(row, x, row_at<decltype(type)>(p.y, image, token), scale, factor, n);
      return Status{};
    };
    if constexpr (std::is_same_v<T, float>) {
      with_float_type(p.y_dtype, add);
    } else {
      add(T{});
    }
    normalise_row(i, row, sum);
    if (streams_residual) copy_row<true>(residual, row, n);
  };
  run_parallel(parallel_for, rows, grain_for(2 * (row_bytes + out_bytes)),
               [&](int64_t begin, int64_t end) {
                 alignas(64) char kept[kRowBytes];
                 for (int64_t i = begin; i < end; ++i) {
                   if (p.y.given) {
                     add_row(i, reinterpret_cast<T*>(kept));
                   } else {
                     const T* const row = row_at<T>(p.x, i / p.tokens, i % p.tokens);
                     normalise_row(i, row, sum_of(row, n));
                   }
                 }
               });
  return Status{};
}

}  // namespace

Status add_layer_norm_fwd(const AddLayerNormFwdParams& p, ParallelFor parallel_for) {
  return with_float_type(p.residual_dtype,
                         [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

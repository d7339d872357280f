// With n = (residual - mean) * rstd, g = grad_out and m() the mean over a row's channels:
// dx = grad_residual + rstd * (g w - m(g w) - n m(g w n));  dy = dx * scale * drop;
// dweight, dbias, dscale = sums of g n, g and dx * drop * y over the rows.
//
// in:       grad_residual and residual, grad_out, y [A, R, C] by strides, last dim contiguous, each
//           but residual may be absent; weight, scale [C] and drop [A] fp32, each may be absent;
//           mean, rstd fp32 [A, R]
// out:      dx of residual's dtype, dy of y's [A, R, C], dweight, dbias, dscale fp32 [C];
//           contiguous, each only if asked for
// numerics: fp32, dx and dy rounded once; column sums over chunks of at most 32 rows, which depend
//           on the shape alone, are added in double and rounded once
// cost:     everything read once from memory, grad_out and residual once more from the cache; a
//           thread owns chunks of rows, whose sums stay in its first-level cache
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/add_layer_norm/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// Channels whose gradient is held in fp32 until it is written in both dtypes.
constexpr int64_t kTile = 512;

// acc += value, of sums that may not be asked for.
template <bool kWhole>
MIMKERNELS_INLINE void add_if(float* acc, const Pack16& value, int64_t n) {
  if (acc == nullptr) return;
  store_columns<16, kWhole, false>(acc, load_columns<16, kWhole>(acc, n) + value, n);
}

// A row whose LayerNorm is differentiated.
template <typename T, typename O>
struct NormRow {
  const O* grad;
  const T* residual;
  const float* weight;
  Pack16 mean;
  Pack16 rstd;

  template <bool kWhole>
  MIMKERNELS_INLINE Pack16 normal(int64_t j, int64_t n) const {
    return (load_columns<16, kWhole>(residual + j, n) - mean) * rstd;
  }

  template <bool kWhole>
  MIMKERNELS_INLINE Pack16 upstream(int64_t j, int64_t n) const {
    return load_columns<16, kWhole>(grad + j, n);
  }

  template <bool kWhole>
  MIMKERNELS_INLINE Pack16 weights(int64_t j, int64_t n) const {
    return load_columns<16, kWhole>(weight + j, n);
  }
};

// m(g w) and m(g w n).
struct RowMeans {
  Pack16 plain;
  Pack16 projected;
};

// The means of a row; g n and g are added to dweight and dbias, each of which may be null.
template <typename T, typename O>
RowMeans means_of(const NormRow<T, O>& row, float* dweight, float* dbias, int64_t n) {
  Pack16 plain = broadcast<16>(0.0f);
  Pack16 projected = broadcast<16>(0.0f);
  const auto step = [&](auto whole, int64_t j) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = whole.value;
    const int64_t rest = n - j;
    const Pack16 g = row.template upstream<kWhole>(j, rest);
    const Pack16 normal = row.template normal<kWhole>(j, rest);
    const Pack16 weighted = g * row.template weights<kWhole>(j, rest);
    plain = plain + weighted;
    projected = projected + weighted * normal;
    add_if<kWhole>(dweight == nullptr ? nullptr : dweight + j, g * normal, rest);
    add_if<kWhole>(dbias == nullptr ? nullptr : dbias + j, g, rest);
  };
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) step(std::true_type{}, j);
  if (j < n) step(std::false_type{}, j);
  const float count = static_cast<float>(n);
  return {broadcast<16>(sum_lanes(plain) / count), broadcast<16>(sum_lanes(projected) / count)};
}

// d[0:n] = rstd * (g w - m(g w) - n m(g w n)) + grad_residual, of channels from `at` on.
template <typename T, typename O>
void gradient_of(float* d, const NormRow<T, O>& row, const RowMeans& means, const T* grad_residual,
                 int64_t at, int64_t n) {
  const auto step = [&](auto whole, int64_t j) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = whole.value;
    const int64_t rest = n - j;
    const Pack16 weighted =
        row.template upstream<kWhole>(at + j, rest) * row.template weights<kWhole>(at + j, rest);
    const Pack16 normal = row.template normal<kWhole>(at + j, rest);
    Pack16 value = row.rstd * (weighted - means.plain - normal * means.projected);
    if (grad_residual != nullptr) {
      value = value + load_columns<16, kWhole>(grad_residual + at + j, rest);
    }
    store_columns<16, kWhole, false>(d + j, value, rest);
  };
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) step(std::true_type{}, j);
  if (j < n) step(std::false_type{}, j);
}

// dy = d * factor * scale
template <bool kStream, typename U>
void scale_row(U* dy, const float* d, const float* scale, float factor, int64_t n) {
  const Pack16 factors = broadcast<16>(factor);
  const auto step = [&](auto whole, int64_t j) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = whole.value;
    Pack16 by = factors;
    if (scale != nullptr) by = by * load_columns<16, kWhole>(scale + j, n - j);
    const Pack16 value = load_columns<16, kWhole>(d + j, n - j) * by;
    store_columns<16, kWhole, kStream>(dy + j, value, n - j);
  };
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) step(std::true_type{}, j);
  if (j < n) step(std::false_type{}, j);
}

// acc += d * factor * y
template <typename U>
void add_products(float* acc, const float* d, const U* y, float factor, int64_t n) {
  const Pack16 factors = broadcast<16>(factor);
  const auto step = [&](auto whole, int64_t j) MIMKERNELS_LAMBDA_INLINE {
    constexpr bool kWhole = whole.value;
    const Pack16 value = load_columns<16, kWhole>(d + j, n - j) * factors;
    add_if<kWhole>(acc + j, value * load_columns<16, kWhole>(y + j, n - j), n - j);
  };
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) step(std::true_type{}, j);
  if (j < n) step(std::false_type{}, j);
}

// What a chunk of rows adds to dweight, dbias and dscale; null where that is not asked for.
struct ColumnSums {
  float* weight;
  float* bias;
  float* scale;
};

template <typename T>
class Backward {
 public:
  Backward(const AddLayerNormBwdParams& p, const float* weight)
      : p_(p), weight_(weight), dim_(p.dim) {
    const int64_t rows = p.batch * p.tokens;
    const int64_t x_bytes = dim_ * static_cast<int64_t>(sizeof(T));
    const int64_t y_bytes = dim_ * (p.y_dtype == DType::kFloat32 ? 4 : 2);
    streams_x_ = p.dx != nullptr && may_stream(p.dx, rows * x_bytes, x_bytes);
    streams_y_ = p.dy != nullptr && may_stream(p.dy, rows * y_bytes, y_bytes);
  }

  // Row i, whose gradient reaches it by the LayerNorm, too.
  template <typename O>
  void normalised_row(int64_t i, const ColumnSums& sums) const {
    const int64_t image = i / p_.tokens;
    const int64_t token = i % p_.tokens;
    const NormRow<T, O> row = {row_at<O>(p_.grad_out, image, token),
                               row_at<T>(p_.residual, image, token), weight_,
                               broadcast<16>(p_.mean[i]), broadcast<16>(p_.rstd[i])};
    const RowMeans means = means_of(row, sums.weight, sums.bias, dim_);
    const T* const grad_residual =
        p_.grad_residual.given ? row_at<T>(p_.grad_residual, image, token) : nullptr;
    by_tile(i, sums, [&](float* d, int64_t at, int64_t n) {
      gradient_of(d, row, means, grad_residual, at, n);
    });
  }

  // Row i of the stream alone.
  void plain_row(int64_t i, const ColumnSums& sums) const {
    by_tile(i, sums, [&](float* d, int64_t at, int64_t n) {
      if (p_.grad_residual.given) {
        set_acc(d, row_at<T>(p_.grad_residual, i / p_.tokens, i % p_.tokens) + at, n);
      } else {
        zero_row<false>(d, n);
      }
    });
  }

 private:
  // Calls compute(d, at, n) and writes what it put into d.
  template <typename Compute>
  MIMKERNELS_INLINE void by_tile(int64_t i, const ColumnSums& sums, const Compute& compute) const {
    if (p_.dx == nullptr && p_.dy == nullptr && sums.scale == nullptr) return;
    const int64_t image = i / p_.tokens;
    const float factor = p_.has_drop ? p_.drop[image] : 1.0f;
    alignas(64) float d[kTile];
    for (int64_t at = 0; at < dim_; at += kTile) {
      const int64_t n = min_of(kTile, dim_ - at);
      compute(d, at, n);
      if (p_.dx != nullptr) {
        T* const dx = static_cast<T*>(p_.dx) + i * dim_ + at;
        if (streams_x_) {
          round_acc<true>(dx, d, n);
        } else {
          round_acc<false>(dx, d, n);
        }
      }
      if (p_.dy == nullptr && sums.scale == nullptr) continue;
      with_float_type(p_.y_dtype, [&](auto type) {
        using U = decltype(type);
        if (sums.scale != nullptr) {
          const U* const y = row_at<U>(p_.y, image, i % p_.tokens) + at;
          add_products(sums.scale + at, d, y, factor, n);
        }
        if (p_.dy == nullptr) return Status{};
        U* const dy = static_cast<U*>(p_.dy) + i * dim_ + at;
        const float* const scale = p_.has_scale ? p_.scale + at : nullptr;
        if (streams_y_) {
          scale_row<true>(dy, d, scale, factor, n);
        } else {
          scale_row<false>(dy, d, scale, factor, n);
        }
        return Status{};
      });
    }
  }

  const AddLayerNormBwdParams& p_;
  const float* weight_;
  int64_t dim_;
  bool streams_x_ = false;
  bool streams_y_ = false;
};

template <typename T>
Status run(const AddLayerNormBwdParams& p, ParallelFor parallel_for) {
  const int64_t rows = p.batch * p.tokens;
  // Few rows, so that every thread has some and no sum in fp32 is long.
  const int64_t chunk = min_of(32, max_of(8, rows / 64));
  const int64_t chunks = ceil_div(rows, chunk);
  float* const outputs[] = {p.dweight, p.dbias, p.dscale};
  int64_t sums = 0;
  for (const float* output : outputs) sums += output != nullptr;
  Scratch<float> ones(p.has_weight ? 0 : p.dim);
  Scratch<float> partial(sums * chunks, p.dim);  // [dweight, dbias, dscale][chunk, C]
  if (ones.failed() || partial.failed()) return out_of_memory();
  for (int64_t j = 0; !p.has_weight && j < p.dim; ++j) ones.get()[j] = 1.0f;
  float* parts[3] = {};
  int64_t place = 0;
  for (int k = 0; k < 3; ++k) {
    if (outputs[k] != nullptr) parts[k] = partial.get() + place++ * chunks * p.dim;
  }

  const Backward<T> backward(p, p.has_weight ? p.weight : ones.get());
  const int64_t work = 4 * chunk * p.dim * static_cast<int64_t>(sizeof(T));
  run_parallel(parallel_for, chunks, grain_for(work), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float* at[3] = {};
      for (int k = 0; k < 3; ++k) {
        if (parts[k] == nullptr) continue;
        at[k] = parts[k] + c * p.dim;
        zero_row<false>(at[k], p.dim);
      }
      const ColumnSums sums_here = {at[0], at[1], at[2]};
      const int64_t stop = min_of(rows, (c + 1) * chunk);
      if (!p.grad_out.given) {
        for (int64_t i = c * chunk; i < stop; ++i) backward.plain_row(i, sums_here);
        continue;
      }
      with_float_type(p.out_dtype, [&](auto type) {
        for (int64_t i = c * chunk; i < stop; ++i) {
          backward.template normalised_row<decltype(type)>(i, sums_here);
        }
        return Status{};
      });
    }
  });
  for (int k = 0; k < 3; ++k) {
    if (parts[k] == nullptr) continue;
    const float* const part = parts[k];
    const auto row = [&](int64_t, int64_t c) -> const float* { return part + c * p.dim; };
    const Status status = sum_rows(parallel_for, 1, chunks, p.dim, outputs[k], float{}, row);
    if (status.code != StatusCode::kOk) return status;
  }
  return Status{};
}

}  // namespace

Status add_layer_norm_bwd(const AddLayerNormBwdParams& p, ParallelFor parallel_for) {
  if (p.dim == 0) return Status{};
  return with_float_type(p.residual_dtype,
                         [&](auto type) { return run<decltype(type)>(p, parallel_for); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

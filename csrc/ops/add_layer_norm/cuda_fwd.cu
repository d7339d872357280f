#include "ops/add_layer_norm/cuda.cuh"
#include "ops/add_layer_norm/cuda.h"

namespace mimkernels::cuda {
namespace {

// A row of the call.
struct NormRow {
  const void* x;
  const void* y;
  void* residual;
  void* normalised;
  float factor;  // of the image: drop

  template <typename Types>
  __device__ __forceinline__ NormRow(const AddLayerNormFwdParams& p, const Types& types,
                                     int64_t row) {
    int64_t token;
    const int64_t image = divide(row, p.tokens, token);
    x = row_of(p.x, types.x, image, token);
    y = row_of(p.y, types.y, image, token);
    residual = row_of(p.residual, types.x, row, p.dim);
    normalised = row_of(p.out, types.out, row, p.dim);
    factor = p.has_drop ? __ldg(p.drop + image) : 1.0f;
  }
};

template <int VEC, typename Types>
__device__ __forceinline__ void load_words(const AddLayerNormFwdParams& p, const Types& types,
                                           const NormRow& row, RawWord<VEC>& raw_x,
                                           RawWord<VEC>& raw_y, int64_t word) {
  load_raw<VEC>(raw_x, row.x, types.x, word);
  if (p.y.given) {
    load_raw<VEC>(raw_y, row.y, types.y, word);
  }
}

// x + drop * scale * y of one word in fp32, rounded to the residual's type and, if `stores`, stored
// where the residual is wanted.
template <int VEC, typename Types>
__device__ __forceinline__ void add_branch(const AddLayerNormFwdParams& p, const Types& types,
                                           const NormRow& row, float (&values)[VEC],
                                           const RawWord<VEC>& raw_x, const RawWord<VEC>& raw_y,
                                           int64_t word, bool stores) {
  widen<VEC>(values, raw_x, types.x);
  if (p.y.given) {
    float y[VEC];
    float scale[VEC];
    widen<VEC>(y, raw_y, types.y);
    load_parameter<VEC>(scale, p.has_scale, p.scale, word, 1.0f);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      values[e] += row.factor * scale[e] * y[e];
    }
  }
  store_word<VEC>(stores ? row.residual : nullptr, types.x, word, values);
}

// What lanes add up about a row's mean as first computed.
struct Moments {
  float shift = 0.0f;  // what the mean lacks
  float square = 0.0f;

  template <int VEC>
  __device__ __forceinline__ void add(const float (&values)[VEC], float mean) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const float d = values[e] - mean;
      shift += d;
      square += d * d;
    }
  }
};

// A row's statistics: the mean in two parts, of which the second is far smaller, and 1 / sqrt(the
// variance + eps).
struct Statistics {
  float mean;
  float shift;
  float rstd;

  __device__ __forceinline__ Statistics(float about, Moments sums, float dim, float eps)
      : mean(about), shift(sums.shift / dim) {
    const float variance = sums.square / dim - shift * shift;
    // Not fmaxf: NaN has to remain.
    rstd = rsqrtf((variance < 0.0f ? 0.0f : variance) + eps);
  }

  __device__ __forceinline__ void store(const AddLayerNormFwdParams& p, int64_t row) const {
    p.mean[row] = mean + shift;
    p.rstd[row] = rstd;
  }
};

// The normalised values of one word times weight plus bias, stored.
template <int VEC, typename Types>
__device__ __forceinline__ void store_normalised(const AddLayerNormFwdParams& p, const Types& types,
                                                 const NormRow& row, float (&values)[VEC],
                                                 int64_t word, const Statistics& of) {
  float weight[VEC];
  float bias[VEC];
  load_parameter<VEC>(weight, p.has_weight, p.weight, word, 1.0f);
  load_parameter<VEC>(bias, p.has_bias, p.bias, word, 0.0f);
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    values[e] = (values[e] - of.mean - of.shift) * of.rstd * weight[e] + bias[e];
  }
  store_word<VEC>(row.normalised, types.out, word, values);
}

// The sum over the warps that share a row, in every thread: the block's, or its own alone. Each sum
// of a row has a `place` of its own in shared memory, [3, 8].
__device__ __forceinline__ float row_sum(float x, bool whole_block, int place) {
  x = warp_sum(x);
  if (!whole_block) {
    return x;
  }
  float* const shared = reinterpret_cast<float*>(shared_memory()) + place * kWarps;
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  float sum = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    sum += shared[w];
  }
  return sum;
}
constexpr int kMomentBytes = 3 * kWarps * static_cast<int>(sizeof(float));

// grid:     a warp, or the block where BLOCK, owns one row, then loops
// in:       x, y [A, R, C] by stride, last stride 1; scale, weight, bias fp32 [C], drop fp32 [A]; all
//           but x may be absent
// out:      residual [A, R, C] or none, normalised [A, R, C], mean and rstd fp32 [A, R]; contiguous,
//           every element written exactly once
// numerics: fp32; the residual is rounded before it is normalised; a first pass over the registers
//           gives the mean, a second what it lacks and the variance about it; lanes apart, at most
//           32 terms in a row, then by a tree, then the warps in order
// bounds:   C <= lanes * WORDS * VEC; the tail of a row is masked; offsets are int64
// cost:     x and y read once, residual and normalised written once; 2 * WORDS independent loads in
//           flight per thread, parameters from the cache; 96 bytes of shared memory and three
//           barriers a row where BLOCK; no atomics, deterministic
template <typename Types, int VEC, int WORDS, bool BLOCK>
__global__ void __launch_bounds__(kThreads, BLOCK ? 3 : 2)
    add_layer_norm_fwd_kernel(AddLayerNormFwdParams p) {
  constexpr Types kTypes;
  constexpr int kLanes = BLOCK ? kThreads : kWarp;
  constexpr int kRows = kThreads / kLanes;
  constexpr int kBatch = 16 / VEC;
  const int lane = threadIdx.x % kLanes;
  const int words = static_cast<int>(p.dim / VEC);
  const float dim = static_cast<float>(p.dim);
  for (int64_t i = blockIdx.x * int64_t{kRows} + threadIdx.x / kLanes; i < p.batch * p.tokens;
       i += gridDim.x * int64_t{kRows}) {
    const NormRow row(p, kTypes, i);
    float values[WORDS][VEC];
    float sum = 0.0f;
#pragma unroll
    for (int first = 0; first < WORDS; first += kBatch) {
      RawWord<VEC> raw_x[kBatch];
      RawWord<VEC> raw_y[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int word = lane + (first + k) * kLanes;
        if (word < words) {
          load_words<VEC>(p, kTypes, row, raw_x[k], raw_y[k], word);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int word = lane + (first + k) * kLanes;
        if (word < words) {
          add_branch<VEC>(p, kTypes, row, values[first + k], raw_x[k], raw_y[k], word, true);
#pragma unroll
          for (int e = 0; e < VEC; ++e) {
            sum += values[first + k][e];
          }
        }
      }
    }
    const float mean = row_sum(sum, BLOCK, 0) / dim;
    Moments sums;
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
      if (lane + k * kLanes < words) {
        sums.add<VEC>(values[k], mean);
      }
    }
    sums = {row_sum(sums.shift, BLOCK, 1), row_sum(sums.square, BLOCK, 2)};
    const Statistics of(mean, sums, dim, p.eps);
    if (lane == 0) {
      of.store(p, i);
    }
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
      if (lane + k * kLanes < words) {
        store_normalised<VEC>(p, kTypes, row, values[k], lane + k * kLanes, of);
      }
    }
  }
}

// As above, for rows of any length and all types.
//
// grid:     a warp or the block owns one row, then loops
// numerics: chains of C / 32 or C / 256 terms
// bounds:   the tail of a row is masked; offsets are int64
// cost:     x and y read three times, from the cache as a rule
template <int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    add_layer_norm_any_fwd_kernel(AddLayerNormFwdParams p, AnyTypes types, bool whole_block) {
  const int64_t words = p.dim / VEC;
  const float dim = static_cast<float>(p.dim);
  const int lanes = whole_block ? kThreads : kWarp;
  const int lane = threadIdx.x % lanes;
  const int64_t at_once = kThreads / lanes;
  for (int64_t i = blockIdx.x * at_once + threadIdx.x / lanes; i < p.batch * p.tokens;
       i += gridDim.x * at_once) {
    const NormRow row(p, types, i);
    const auto read = [&](float (&values)[VEC], int64_t word, bool stores) {
      RawWord<VEC> raw_x;
      RawWord<VEC> raw_y;
      load_words<VEC>(p, types, row, raw_x, raw_y, word);
      add_branch<VEC>(p, types, row, values, raw_x, raw_y, word, stores);
    };
    float values[VEC];
    float sum = 0.0f;
    for (int64_t word = lane; word < words; word += lanes) {
      read(values, word, true);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        sum += values[e];
      }
    }
    const float mean = row_sum(sum, whole_block, 0) / dim;
    Moments sums;
    for (int64_t word = lane; word < words; word += lanes) {
      read(values, word, false);
      sums.add<VEC>(values, mean);
    }
    sums = {row_sum(sums.shift, whole_block, 1), row_sum(sums.square, whole_block, 2)};
    const Statistics of(mean, sums, dim, p.eps);
    if (lane == 0) {
      of.store(p, i);
    }
    for (int64_t word = lane; word < words; word += lanes) {
      read(values, word, false);
      store_normalised<VEC>(p, types, row, values, word, of);
    }
  }
}

bool all_fit(const AddLayerNormFwdParams& p, int vec) {
  return words_fit(p.x, p.dim, p.residual_dtype, vec) && words_fit(p.y, p.dim, p.y_dtype, vec) &&
         words_fit({p.scale, 0, 0}, p.dim, DType::kFloat32, vec) &&
         words_fit({p.weight, 0, 0}, p.dim, DType::kFloat32, vec) &&
         words_fit({p.bias, 0, 0}, p.dim, DType::kFloat32, vec) &&
         words_fit({p.residual, 0, 0}, p.dim, p.residual_dtype, vec) &&
         words_fit({p.out, 0, 0}, p.dim, p.out_dtype, vec);
}

}  // namespace

cudaError_t add_layer_norm_fwd(const AddLayerNormFwdParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.tokens;
  if (rows == 0) {
    return cudaSuccess;
  }
  // Without a branch its type is of no account.
  const AnyTypes types = {p.residual_dtype, p.y.given ? p.y_dtype : p.out_dtype, p.out_dtype};
  constexpr int kHeldByWarp = 32;   // elements of a row that a lane holds, where it has 31 others
  constexpr int kHeldByBlock = 16;  // and where it has 255
  cudaError_t error = cudaSuccess;
  if (p.dim <= kHeldByBlock * kThreads && all_fit(p, p.residual_dtype == DType::kFloat32 ? 4 : 8) &&
      with_fixed_types(types, error, [&](auto fixed) {
        using Types = decltype(fixed);
        constexpr int kVec = Types::x == DType::kFloat32 ? 4 : 8;
        if (p.dim <= kHeldByWarp * kWarp) {
          return launch(add_layer_norm_fwd_kernel<Types, kVec, kHeldByWarp / kVec, false>,
                        blocks_for(rows, kWarps), kThreads, 0, stream, p);
        }
        return launch(add_layer_norm_fwd_kernel<Types, kVec, kHeldByBlock / kVec, true>,
                      blocks_for(rows, 1), kThreads, kMomentBytes, stream, p);
      })) {
    return error;
  }
  const auto any = [&](auto kernel, int vec) {
    // A warp to a row while its lanes have little to read.
    const bool whole_block = p.dim / vec > 16 * kWarp;
    return launch(kernel, blocks_for(rows, whole_block ? 1 : kWarps), kThreads, kMomentBytes,
                  stream, p, types, whole_block);
  };
  return all_fit(p, 4) ? any(add_layer_norm_any_fwd_kernel<4>, 4)
                       : any(add_layer_norm_any_fwd_kernel<1>, 1);
}

}  // namespace mimkernels::cuda

#include "cuda/ranks.cuh"
#include "ops/mask_from_noise/cuda.h"

namespace mimkernels::cuda {
namespace {

// keys:     the bits of the noise in an order that unsigned integers share: -0.0 equals 0.0, NaN
//           last
struct NoiseKeys {
  const float* noise;  // [B, N]
  int64_t stride;
  int tokens;

  __device__ __forceinline__ void keys(int64_t b, uint32_t* keys, int padded) const {
    const float* const row = noise + b * stride;
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
      uint32_t key = kPadding;
      if (i < tokens) {
        const float value = __ldg(row + i);
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        const uint32_t magnitude = bits & 0x7fffffffu;
        // Negative numbers count down, zero is one number, positive ones come after.
        key = bits == magnitude ? 0x80000000u + magnitude : 0x80000000u - magnitude;
        key = magnitude > 0x7f800000u ? 0xffffffffu : key;
      }
      keys[i] = key;
    }
  }
};

}  // namespace

cudaError_t mask_from_noise_fwd(const MaskFromNoiseParams& p, cudaStream_t stream) {
  const NoiseKeys keys = {p.noise, p.noise_stride, static_cast<int>(p.tokens)};
  return make_masks(p, keys, stream);
}

}  // namespace mimkernels::cuda

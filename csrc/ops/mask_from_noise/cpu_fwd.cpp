// Masks from given noise: the published double argsort, ties by index.
//
// in:       noise fp32 [B, N], last dim contiguous
// keys:     the bits of the noise in an order that unsigned integers share: -0.0 equals 0.0, NaN
//           last
// out:      as random_mask
// cost:     as random_mask; noise that crowds together costs O(N^2) register compares
#include "cpu/kernels.h"
#include "cpu/ranks.h"
#include "ops/mask_from_noise/params.h"

namespace mimkernels::MIMKERNELS_ISA {

Status mask_from_noise_fwd(const MaskFromNoiseParams& p, ParallelFor parallel_for) {
  return make_masks(p, parallel_for, [&](int64_t b, uint32_t* keys) {
    const float* noise = p.noise + b * p.noise_stride;
    for (int64_t i = 0; i < p.tokens; ++i) {
      uint32_t bits;
      memcpy(&bits, noise + i, sizeof(bits));
      const uint32_t magnitude = bits & 0x7fffffffu;
      // Negative numbers count down, zero is one number, positive ones come after.
      const uint32_t ordered =
          bits == magnitude ? 0x80000000u + magnitude : 0x80000000u - magnitude;
      keys[i] = magnitude > 0x7f800000u ? 0xffffffffu : ordered;
    }
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA

#include "core/philox.h"
#include "cuda/ranks.cuh"
#include "ops/random_mask/cuda.h"

namespace mimkernels::cuda {
namespace {

// keys:     u32 [N], keys[i] = word i % 4 of Philox4x32-10 under key (seed_lo, seed_hi) at counter
//           (i / 4, b, offset_lo, offset_hi)
struct PhiloxKeys {
  uint64_t seed;
  uint64_t offset;
  const int64_t* step;  // on the device, or null
  int tokens;

  __device__ __forceinline__ void keys(int64_t b, uint32_t* keys, int padded) const {
    uint64_t at = offset;
    if (step != nullptr) {
      at += static_cast<uint64_t>(__ldg(step));
    }
    const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int quad = threadIdx.x; quad < padded / 4; quad += blockDim.x) {
      const PhiloxWords noise =
          philox4x32_10(static_cast<uint32_t>(quad), static_cast<uint32_t>(b),
                        static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), key);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        keys[4 * quad + w] = 4 * quad + w < tokens ? noise.word[w] : kPadding;
      }
    }
  }
};

}  // namespace

cudaError_t random_mask_fwd(const RandomMaskParams& p, cudaStream_t stream) {
  return make_masks(p, PhiloxKeys{p.seed, p.offset, p.step, static_cast<int>(p.tokens)}, stream);
}

}  // namespace mimkernels::cuda

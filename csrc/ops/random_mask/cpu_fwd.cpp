// Random masks from a seed: the same integers on every backend.
//
// noise:    u32 [B, N], noise[b, i] = word i % 4 of Philox4x32-10 under key (seed_lo, seed_hi) at
//           counter (i / 4, b, offset_lo, offset_hi)
// rank:     rank_i = #{j : (noise_j, j) < (noise_i, i)}
// out:      ids_shuffle[b, rank_i] = i, ids_restore[b, i] = rank_i, mask[b, i] = rank_i >= keep;
//           sorted: kept and removed tokens each in the order of their index, mask unchanged
// cost:     a sort by buckets for small N, by radix beyond; a thread owns whole images
#include "core/philox.h"
#include "cpu/kernels.h"
#include "cpu/ranks.h"
#include "ops/random_mask/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

// Philox counters per step; the lanes are independent, so the compiler keeps them in registers.
constexpr int kCounters = 16;

MIMKERNELS_INLINE void fill_noise(const RandomMaskParams& p, int64_t b, uint32_t* noise) {
  const uint64_t offset = p.offset + (p.step == nullptr ? 0 : static_cast<uint64_t>(*p.step));
  const uint32_t offset_lo = static_cast<uint32_t>(offset);
  const uint32_t offset_hi = static_cast<uint32_t>(offset >> 32);
  for (int64_t first = 0; first < p.tokens; first += 4 * kCounters) {
    alignas(64) uint32_t c0[kCounters];
    alignas(64) uint32_t c1[kCounters];
    alignas(64) uint32_t c2[kCounters];
    alignas(64) uint32_t c3[kCounters];
    for (int l = 0; l < kCounters; ++l) {
      c0[l] = static_cast<uint32_t>(first / 4) + static_cast<uint32_t>(l);
      c1[l] = static_cast<uint32_t>(b);
      c2[l] = offset_lo;
      c3[l] = offset_hi;
    }
    uint32_t k0 = static_cast<uint32_t>(p.seed);
    uint32_t k1 = static_cast<uint32_t>(p.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int l = 0; l < kCounters; ++l) philox_round(c0[l], c1[l], c2[l], c3[l], k0, k1);
      philox_next_key(k0, k1);
    }
    const int64_t n = min_of(4 * kCounters, p.tokens - first);
    for (int64_t i = 0; i < n / 4; ++i) {
      noise[first + 4 * i] = c0[i];
      noise[first + 4 * i + 1] = c1[i];
      noise[first + 4 * i + 2] = c2[i];
      noise[first + 4 * i + 3] = c3[i];
    }
    const uint32_t* words[4] = {c0, c1, c2, c3};
    for (int64_t i = n - n % 4; i < n; ++i) noise[first + i] = words[i % 4][i / 4];
  }
}

}  // namespace

Status random_mask_fwd(const RandomMaskParams& p, ParallelFor parallel_for) {
  return make_masks(p, parallel_for, [&](int64_t b, uint32_t* keys) { fill_noise(p, b, keys); });
}

}  // namespace mimkernels::MIMKERNELS_ISA

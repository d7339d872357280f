// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): 128-bit counter, 64-bit key, ten rounds, no state.
#pragma once

#include <cstdint>

// Static and always inline on the host: this header is compiled once per instruction set, and a
// shared out-of-line copy could be one that the running CPU cannot execute.
#if defined(__CUDACC__)
#define MIMKERNELS_PHILOX_INLINE static __host__ __device__ __forceinline__
#else
#define MIMKERNELS_PHILOX_INLINE static inline __attribute__((always_inline))
#endif

namespace mimkernels {

struct PhiloxKey {
  uint32_t lo = 0;
  uint32_t hi = 0;
};

struct PhiloxWords {
  uint32_t word[4] = {0, 0, 0, 0};
};

MIMKERNELS_PHILOX_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                           uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
  const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c1 = static_cast<uint32_t>(p1);
  c3 = static_cast<uint32_t>(p0);
}

MIMKERNELS_PHILOX_INLINE void philox_next_key(uint32_t& k0, uint32_t& k1) {
  k0 += 0x9E3779B9u;
  k1 += 0xBB67AE85u;
}

MIMKERNELS_PHILOX_INLINE PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2,
                                                   uint32_t c3, PhiloxKey key) {
  uint32_t k0 = key.lo;
  uint32_t k1 = key.hi;
  for (int round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    philox_next_key(k0, k1);
  }
  PhiloxWords out;
  out.word[0] = c0;
  out.word[1] = c1;
  out.word[2] = c2;
  out.word[3] = c3;
  return out;
}

}  // namespace mimkernels

// Random numbers of one sample: a function of the seed, the epoch, the sample's number and the purpose alone, so that
// whichever process draws them draws the same.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace mimkernels::masks {

// What numbers are for; they never meet those of random_mask, whose counters start at 0.
enum class Purpose : uint32_t {
  kMask = 0x80000000u,
  kSubset = 0x90000000u,
  kSecondSubset = 0xA0000000u,
};

// Words of Philox4x32-10 with key `seed` and counter (purpose + 0, 1, 2, ..., sample, epoch).
class Stream {
 public:
  Stream(uint64_t seed, uint64_t epoch, uint32_t sample, Purpose purpose)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        epoch_(epoch),
        sample_(sample),
        block_(static_cast<uint32_t>(purpose)) {}

  uint32_t word() {
    if (used_ == 4) {
      words_ = philox4x32_10(block_++, sample_, static_cast<uint32_t>(epoch_),
                             static_cast<uint32_t>(epoch_ >> 32), key_);
      used_ = 0;
    }
    return words_.word[used_++];
  }

  // In [low, high), in steps of 2^-32 of the range; `high` may be below `low`.
  double uniform(double low, double high) { return low + (high - low) * (word() * 0x1p-32); }

  // In [0, count); every value is as likely as any other up to count / 2^32.
  int below(int count) {
    return static_cast<int>(static_cast<uint64_t>(word()) * static_cast<uint64_t>(count) >> 32);
  }

 private:
  PhiloxKey key_;
  uint64_t epoch_;
  uint32_t sample_;
  uint32_t block_;
  uint32_t used_ = 4;
  PhiloxWords words_;
};

}  // namespace mimkernels::masks

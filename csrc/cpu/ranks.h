// Ranks of 32-bit keys, ties by index: what an argsort of an argsort gives, without the argsorts.
#pragma once

#include "cpu/rows.h"

namespace mimkernels::MIMKERNELS_ISA {

// Up to here keys are sorted by buckets, or every key is compared with every other, registers at a
// time; beyond, a radix sort wins.
constexpr int64_t kFewTokens = 512;
// Buckets hold one key on average where keys are spread evenly. Fuller ones would take too long.
constexpr int kMostInBucket = 12;
// Keys are compared in blocks of four registers; key buffers are this much longer than N.
constexpr int64_t kKeyPadding = 4 * kLanes;

// rank[i] = #{j : (key_j, j) < (key_i, i)}. Reads up to kKeyPadding keys past n, whatever they
// hold.
MIMKERNELS_INLINE void rank_by_counting(const uint32_t* keys, int64_t n, int32_t* rank) {
  using I = typename VecTypes<kLanes>::I;
  using U = typename VecTypes<kLanes>::U;
  constexpr int kRegisters = 4;
  constexpr int64_t kBlock = kRegisters * kLanes;
  // Only signed compares are cheap everywhere, so the top bit is flipped on both sides.
  constexpr uint32_t kFlip = 0x80000000u;
  I lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int64_t first = 0; first < n; first += kBlock) {
    I mine[kRegisters];
    I count[kRegisters];
    MIMKERNELS_UNROLL
    for (int q = 0; q < kRegisters; ++q) {
      U bits;
      memcpy(&bits, keys + first + q * kLanes, sizeof(bits));
      mine[q] = (I)(bits ^ kFlip);
      count[q] = I{} + static_cast<int32_t>(first);
    }
    // Earlier keys count unless they are greater; a true comparison is -1.
    for (int64_t j = 0; j < first; ++j) {
      const I other = I{} + static_cast<int32_t>(keys[j] ^ kFlip);
      MIMKERNELS_UNROLL
      for (int q = 0; q < kRegisters; ++q) count[q] += other > mine[q];
    }
    const int64_t stop = min_of(n, first + kBlock);
    for (int64_t j = first; j < stop; ++j) {
      const I other = I{} + static_cast<int32_t>(keys[j] ^ kFlip);
      MIMKERNELS_UNROLL
      for (int q = 0; q < kRegisters; ++q) {
        const I later = lane > static_cast<int32_t>(j - first - q * kLanes);
        count[q] -= (mine[q] > other) | ((mine[q] == other) & later);
      }
    }
    for (int64_t j = stop; j < n; ++j) {
      const I other = I{} + static_cast<int32_t>(keys[j] ^ kFlip);
      MIMKERNELS_UNROLL
      for (int q = 0; q < kRegisters; ++q) count[q] -= mine[q] > other;
    }
    for (int q = 0; q < kRegisters; ++q) {
      const int64_t at = first + q * kLanes;
      if (at + kLanes <= n) {
        memcpy(rank + at, &count[q], sizeof(I));
      } else {
        for (int64_t l = 0; l < n - at; ++l) rank[at + l] = count[q][l];
      }
    }
  }
}

// The same for few keys that are spread out, as random ones are: into buckets by their leading
// bits, then each to its place among its neighbours. Returns false, and has written no rank, where
// a bucket is too full. `pairs` holds n key-index pairs.
MIMKERNELS_INLINE bool rank_by_buckets(const uint32_t* keys, int64_t n, uint64_t* pairs,
                                       int32_t* rank) {
  constexpr int kBits = 8;
  constexpr int kBuckets = 1 << kBits;
  uint32_t low = UINT32_MAX;
  uint32_t high = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  int shift = 0;
  while (((high - low) >> shift) >= kBuckets) ++shift;
  uint32_t start[kBuckets] = {};
  for (int64_t i = 0; i < n; ++i) ++start[(keys[i] - low) >> shift];
  uint32_t total = 0;
  uint32_t fullest = 0;
  for (int bucket = 0; bucket < kBuckets; ++bucket) {
    const uint32_t count = start[bucket];
    fullest = count > fullest ? count : fullest;
    start[bucket] = total;
    total += count;
  }
  if (fullest > kMostInBucket) return false;
  for (int64_t i = 0; i < n; ++i) {
    pairs[start[(keys[i] - low) >> shift]++] =
        (static_cast<uint64_t>(keys[i]) << 32) | static_cast<uint64_t>(i);
  }
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t pair = pairs[i];
    int64_t at = i;
    for (; at > 0 && pairs[at - 1] > pair; --at) pairs[at] = pairs[at - 1];
    pairs[at] = pair;
  }
  for (int64_t place = 0; place < n; ++place) {
    rank[pairs[place] & 0xffffffffu] = static_cast<int32_t>(place);
  }
  return true;
}

// The same by a stable radix sort, a byte at a time; bytes that all keys share are skipped. `pairs`
// and `other` hold n key-index pairs each. Returns the sorted pairs, index in the low half.
MIMKERNELS_INLINE const uint64_t* sort_pairs(const uint32_t* keys, int64_t n, uint64_t* pairs,
                                             uint64_t* other) {
  int64_t start[4][256];
  memset(start, 0, sizeof(start));
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = keys[i];
    pairs[i] = (static_cast<uint64_t>(key) << 32) | static_cast<uint64_t>(i);
    for (int digit = 0; digit < 4; ++digit) ++start[digit][(key >> (8 * digit)) & 255u];
  }
  for (int digit = 0; digit < 4; ++digit) {
    int64_t total = 0;
    bool shared = false;
    for (int value = 0; value < 256; ++value) {
      const int64_t count = start[digit][value];
      shared |= count == n;
      start[digit][value] = total;
      total += count;
    }
    if (shared) continue;
    const int shift = 32 + 8 * digit;
    for (int64_t i = 0; i < n; ++i) other[start[digit][(pairs[i] >> shift) & 255u]++] = pairs[i];
    uint64_t* swap = pairs;
    pairs = other;
    other = swap;
  }
  return pairs;
}

// Scratch for the ranks of n tokens: keys (padded), ranks, and two arrays of pairs for the sort.
class RankScratch {
 public:
  explicit RankScratch(int64_t n)
      : keys_(n + kKeyPadding), rank_(n), pairs_(n), other_(n > kFewTokens ? n : 0) {
    if (!keys_.failed()) memset(keys_.get() + n, 0, kKeyPadding * sizeof(uint32_t));
  }

  bool failed() const {
    return keys_.failed() || rank_.failed() || pairs_.failed() || other_.failed();
  }
  uint32_t* keys() const { return keys_.get(); }

  // Ranks of the first n keys.
  MIMKERNELS_INLINE const int32_t* ranks(int64_t n) {
    if (n <= kFewTokens) {
      if (!rank_by_buckets(keys_.get(), n, pairs_.get(), rank_.get())) {
        rank_by_counting(keys_.get(), n, rank_.get());
      }
    } else {
      const uint64_t* sorted = sort_pairs(keys_.get(), n, pairs_.get(), other_.get());
      for (int64_t place = 0; place < n; ++place) {
        rank_.get()[sorted[place] & 0xffffffffu] = static_cast<int32_t>(place);
      }
    }
    return rank_.get();
  }

 private:
  Scratch<uint32_t> keys_;
  Scratch<int32_t> rank_;
  Scratch<uint64_t> pairs_;
  Scratch<uint64_t> other_;
};

// Writes one image's ids_shuffle, ids_restore and mask.
MIMKERNELS_INLINE void write_masks(const int32_t* rank, int64_t n, int64_t keep, bool sorted,
                                   int64_t* ids_shuffle, int64_t* ids_restore, float* mask) {
  if (!sorted) {
    for (int64_t i = 0; i < n; ++i) ids_shuffle[rank[i]] = i;
    for (int64_t i = 0; i < n; ++i) ids_restore[i] = rank[i];
    for (int64_t i = 0; i < n; ++i) mask[i] = rank[i] >= keep ? 1.0f : 0.0f;
    return;
  }
  int64_t next_kept = 0;
  int64_t next_removed = keep;
  for (int64_t i = 0; i < n; ++i) {
    const bool removed = rank[i] >= keep;
    const int64_t place = removed ? next_removed++ : next_kept++;
    ids_shuffle[place] = i;
    ids_restore[i] = place;
    mask[i] = removed ? 1.0f : 0.0f;
  }
}

// Ranks of every image's keys; fill_keys(b, keys) writes the keys of image b.
template <typename Params, typename FillKeys>
MIMKERNELS_INLINE Status make_masks(const Params& p, ParallelFor parallel_for,
                                    const FillKeys& fill_keys) {
  const int64_t n = p.tokens;
  if (n > INT32_MAX) return unsupported();
  int failures = 0;
  run_parallel(parallel_for, p.batch, grain_for(64 * n), [&](int64_t begin, int64_t end) {
    RankScratch scratch(n);
    if (scratch.failed()) {
      __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t b = begin; b < end; ++b) {
      fill_keys(b, scratch.keys());
      write_masks(scratch.ranks(n), n, p.keep, p.sorted, p.ids_shuffle + b * n,
                  p.ids_restore + b * n, p.mask + b * n);
    }
  });
  return failures != 0 ? out_of_memory() : Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

// What the forward and the backward of the masked patch loss share: the target of one patch.
#pragma once

#include "patches.h"

namespace mimkernels::MIMKERNELS_ISA {

// Three runs of L pixels become 3 L interleaved ones: r g b r g b ...
template <int L>
MIMKERNELS_INLINE void interleave_three(float* dst, const typename VecTypes<L>::F& r,
                                        const typename VecTypes<L>::F& g,
                                        const typename VecTypes<L>::F& b) {
  using I = typename VecTypes<L>::I;
  MIMKERNELS_UNROLL
  for (int q = 0; q < 3; ++q) {
    I from_rg = {};
    I from_b = {};
    MIMKERNELS_UNROLL
    for (int l = 0; l < L; ++l) {
      const int element = q * L + l;
      const int channel = element % 3;
      from_rg[l] = channel == 2 ? 0 : channel * L + element / 3;
      from_b[l] = channel == 2 ? L + element / 3 : l;
    }
    store_part<L>(dst + q * L, __builtin_shuffle(__builtin_shuffle(r, g, from_rg), b, from_b));
  }
}

// The target of one patch, in the element order of the predictions, as E floats that stay in L1.
class TargetReader {
 public:
  explicit TargetReader(const MaskedPatchLossParams& p)
      : p_(p),
        layout_(layout_of(p.grid)),
        tile_(layout_.elements + 16),
        planes_(layout_.elements) {}

  bool failed() const { return tile_.failed() || planes_.failed(); }
  int64_t elements() const { return layout_.elements; }

  // The target of pred's patch i (of B * L), valid until the next call. Asks for the pixels of
  // patch `next` on the way, unless that is negative.
  MIMKERNELS_INLINE const float* read(int64_t i, int64_t next) {
    switch (p_.images.dtype) {
      case DType::kFloat32:
        read_as<float>(i, next);
        break;
      case DType::kBFloat16:
        read_as<bf16>(i, next);
        break;
      case DType::kFloat16:
        read_as<fp16>(i, next);
        break;
      case DType::kUInt8:
        read_as<uint8_t>(i, next);
        break;
    }
    if (p_.norm_pix) normalise();
    return tile_.get();
  }

 private:
  static constexpr int kStep = kLanes < 8 ? kLanes : 8;

  template <typename Src>
  MIMKERNELS_INLINE const Src* patch(int64_t i) const {
    if (i < 0) return nullptr;
    const int64_t b = i / p_.length;
    const int64_t j = i % p_.length;
    const int64_t n = p_.has_mask ? j : p_.ids.data[b * p_.ids.stride1 + j];
    return patch_at<Src>(p_.images, p_.grid, layout_, b, n);
  }

  // Planes first, as they lie in memory: the order that hardware prefetchers follow.
  template <typename Src>
  __attribute__((noinline)) void read_as(int64_t i, int64_t next) {
    const bool in_order = !p_.channels_last || p_.grid.channels == 1;
    read_patch<false>(in_order ? tile_.get() : planes_.get(), patch<Src>(i), patch<Src>(next),
                      p_.images, p_.grid);
    if (!in_order) interleave();
  }

  // (c, t, h, w) to (t, h, w, c) within L1.
  __attribute__((noinline)) void interleave() {
    const int64_t channels = p_.grid.channels;
    const int64_t n = layout_.elements / max_of(channels, 1);
    const float* planes = planes_.get();
    float* tile = tile_.get();
    int64_t i = 0;
    if (channels == 3) {
      for (; i + kStep <= n; i += kStep) {
        interleave_three<kStep>(tile + 3 * i, load_part<kStep>(planes + i),
                                load_part<kStep>(planes + n + i),
                                load_part<kStep>(planes + 2 * n + i));
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t at = i; at < n; ++at) tile[at * channels + c] = planes[c * n + at];
    }
  }

  // (t - mean) / sqrt(variance + 1e-6) in place: two passes for the statistics, 32 lanes at a time.
  // The tile has room for whole registers; what is past its end is kept 0 for the sums.
  __attribute__((noinline)) void normalise() {
    const int64_t n = layout_.elements;
    float* tile = tile_.get();
    for (int64_t i = n; i < n + 16; ++i) tile[i] = 0.0f;
    const Pack16 zero = broadcast<16>(0.0f);
    Pack16 sums[2] = {zero, zero};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      sums[0] = sums[0] + load<16>(tile + i);
      sums[1] = sums[1] + load<16>(tile + i + 16);
    }
    for (; i < n; i += 16) sums[0] = sums[0] + load<16>(tile + i);
    const Pack16 mean = broadcast<16>(sum_lanes(sums[0] + sums[1]) / static_cast<float>(n));

    sums[0] = zero;
    sums[1] = zero;
    for (i = 0; i + 32 <= n; i += 32) {
      const Pack16 a = load<16>(tile + i) - mean;
      const Pack16 b = load<16>(tile + i + 16) - mean;
      store<16>(tile + i, a);
      store<16>(tile + i + 16, b);
      sums[0] = sums[0] + a * a;
      sums[1] = sums[1] + b * b;
    }
    for (; i < n; i += 16) {
      const Pack16 a = keep_first(load<16>(tile + i) - mean, min_of(16, n - i));
      store<16>(tile + i, a);
      sums[0] = sums[0] + a * a;
    }
    const float variance = sum_lanes(sums[0] + sums[1]) / static_cast<float>(n - 1);
    const Pack16 inverse_std = broadcast<16>(1.0f / __builtin_sqrtf(variance + 1e-6f));
    for (i = 0; i < n; i += 16) store<16>(tile + i, load<16>(tile + i) * inverse_std);
  }

  const MaskedPatchLossParams& p_;
  PatchLayout layout_;
  Scratch<float> tile_;
  Scratch<float> planes_;
};

MIMKERNELS_INLINE bool counts(const MaskedPatchLossParams& p, int64_t i) {
  return !p.has_mask || p.mask.data[i / p.length * p.mask.stride0 + i % p.length] != 0;
}

// counted(i, next) for every patch in [begin, end) that counts, `next` the one after it or -1;
// skipped(i) for the others.
template <typename Counted, typename Skipped>
MIMKERNELS_INLINE void for_each_patch(const MaskedPatchLossParams& p, int64_t begin, int64_t end,
                                      const Counted& counted, const Skipped& skipped) {
  const auto find = [&](int64_t i) {
    for (; i < end && !counts(p, i); ++i) skipped(i);
    return i;
  };
  for (int64_t i = find(begin); i < end;) {
    const int64_t next = find(i + 1);
    counted(i, next < end ? next : -1);
    i = next;
  }
}

template <typename T>
MIMKERNELS_INLINE const T* pred_row(const MaskedPatchLossParams& p, int64_t i) {
  return row_at<T>(p.pred, i / p.length, i % p.length);
}

MIMKERNELS_INLINE int64_t count_patches(const MaskedPatchLossParams& p) {
  if (!p.has_mask) return p.grid.batch * p.length;
  int64_t count = 0;
  for (int64_t b = 0; b < p.grid.batch; ++b) {
    const uint8_t* mask = p.mask.data + b * p.mask.stride0;
    for (int64_t j = 0; j < p.length; ++j) count += mask[j] != 0;
  }
  return count;
}

MIMKERNELS_INLINE Status check_loss_ids(const MaskedPatchLossParams& p) {
  if (p.has_mask) return Status{};
  return check_ids(p.ids, 1, p.grid.batch, p.length, layout_of(p.grid).patches);
}

// Calls body with the kind of loss as a compile-time constant.
template <LossKind kKind>
struct KindConstant {
  static constexpr LossKind value = kKind;
};

template <typename Body>
MIMKERNELS_INLINE void with_kind(const MaskedPatchLossParams& p, const Body& body) {
  // smooth_l1 with beta 0 is l1, as torch has it.
  const bool is_l1 = p.kind == LossKind::kSmoothL1 && p.beta == 0.0f;
  switch (is_l1 ? LossKind::kL1 : p.kind) {
    case LossKind::kMse:
      return body(KindConstant<LossKind::kMse>{});
    case LossKind::kL1:
      return body(KindConstant<LossKind::kL1>{});
    case LossKind::kSmoothL1:
      return body(KindConstant<LossKind::kSmoothL1>{});
  }
}

}  // namespace mimkernels::MIMKERNELS_ISA

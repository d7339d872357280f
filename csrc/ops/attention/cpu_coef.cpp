// The six coefficients of every row through which upstream gradients of lse and of the statistics
// reach the scores (see AttentionCoefParams).
//
// in:       dlse [B, H, Nq], statistics and their gradients [S, B, H, Nq], fp32, contiguous
// out:      coef fp32 [6, B, H, Nq]; every element written once
// numerics: fp32
// cost:     inputs read once, outputs written once
#include "cpu/attention/math.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "ops/attention/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

MIMKERNELS_INLINE Floats load_row(const float* src, int64_t lanes) {
  return lanes == kLanes ? load_floats(src) : load_some<kLanes>(src, lanes).v[0];
}

MIMKERNELS_INLINE void coefficients(const AttentionCoefParams& p, int64_t i, int64_t lanes) {
  const Floats zero = {};
  Floats both = p.has_dlse ? load_row(p.dlse + i, lanes) : zero;
  Floats slope = zero, c_prefix = zero, c_patch = zero, a_patch = zero, own = zero, far = zero;
  if (p.has_drows) {
    const auto plane = [&](AttentionStat stat) {
      return __builtin_popcountll(static_cast<uint64_t>(p.stats & (stat - 1))) * p.count + i;
    };
    const auto value = [&](AttentionStat stat) { return load_row(p.rows + plane(stat), lanes); };
    const auto up = [&](AttentionStat stat) { return load_row(p.drows + plane(stat), lanes); };
    if (p.stats & kEntropy) {
      slope = -up(kEntropy);
      both -= up(kEntropy) * value(kEntropy);
    }
    if (p.stats & kPrefixMass) {
      c_prefix = up(kPrefixMass);
      both -= c_prefix * value(kPrefixMass);
    }
    if (p.stats & kSelfMass) {
      own = up(kSelfMass);
      both -= own * value(kSelfMass);
    }
    if (p.stats & kDistance) {
      far = up(kDistance);
      both -= far * value(kDistance);
    }
    if (p.stats & kPatchEntropy) {
      const Floats mass = value(kPatchMass);
      const Ints few = (Ints)(mass < splat(kLeastPatchMass));
      const Floats weight = up(kPatchEntropy) / mass;
      a_patch = choose_lanes(few, zero, -weight);
      c_patch = choose_lanes(few, zero, weight * (log_lanes(mass) - value(kPatchEntropy)));
    }
    if (p.stats & kPatchMass) {
      c_patch += up(kPatchMass);
      both -= up(kPatchMass) * value(kPatchMass);
    }
  }
  const Floats out[6] = {both + c_prefix, slope, both + c_patch, slope + a_patch, own, far};
  for (int f = 0; f < 6; ++f) {
    float* dst = p.coef + f * p.count + i;
    if (lanes == kLanes) {
      store_floats(dst, out[f]);
    } else {
      Pack<kLanes> some;
      some.v[0] = out[f];
      store_some<kLanes>(dst, some, lanes);
    }
  }
}

}  // namespace

Status attention_coef(const AttentionCoefParams& p, ParallelFor parallel_for) {
  const int64_t steps = ceil_div(p.count, kLanes);
  run_parallel(parallel_for, steps, grain_for(kLanes * 80), [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      const int64_t i = step * kLanes;
      coefficients(p, i, min_of(kLanes, p.count - i));
    }
  });
  return Status{};
}

}  // namespace mimkernels::MIMKERNELS_ISA

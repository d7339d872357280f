// What the launchers of attention take; see core/params.h.
#pragma once

#include "core/attention.h"

namespace mimkernels {

// Bits of AttentionFwdParams::stats, in the order of the rows that are written.
enum AttentionStat : int64_t {
  kEntropy = 1 << 0,
  kPrefixMass = 1 << 1,
  kSelfMass = 1 << 2,
  kDistance = 1 << 3,
  kPatchEntropy = 1 << 4,
  kPeak = 1 << 5,
  kPatchMass = 1 << 6,
  kMaxScore = 1 << 7,
  kArgmax = 1 << 8,  // a whole number, -1 where no score is the largest
  kAllStats = (1 << 9) - 1,
};

struct AttentionFwdParams {
  AttentionScores scores;
  HeadRows v;
  int64_t num_prefix = 0;
  Positions positions;
  int64_t stats = 0;
  void* out = nullptr;   // [B, Nq, H, D]
  float* lse = nullptr;  // [B, H, Nq]
  // [B, H, Nq]: what rounding took from lse; P = exp((S - lse) - lse_low)
  float* lse_low = nullptr;
  float* rows = nullptr;  // [popcount(stats), B, H, Nq]
};

// A row whose patches have less attention than this has no patch entropy: the value is 0 and has no
// gradient. Down to here every number of the formulas fits into fp32.
constexpr float kLeastPatchMass = 1e-30f;

// How upstream gradients of lse and of the statistics enter the gradient of a row's scores. With
//   L_ij = (S_ij - lse_i) - lse_low_i = log P_ij,
// which stays small where the scores are huge, each statistic's gradient is P_ij times a term
// affine in L_ij (not in S_ij), so that a row needs six numbers, in this order: constant and slope
// on prefix keys, the same on patch keys, the weight of its own key and that of the distance:
//   dS_ij = P_ij (dP_ij - delta_i + constant + slope L_ij + [i = j] own + distance_ij far).
// With d the upstream gradients and f the statistics:
//   entropy        slope -d on all keys,               constant -d f
//   patch_entropy  slope -d / M on patch keys,         constant (d / M) (log M - f) on them;
//                  neither where M, which is patch_mass, is below kLeastPatchMass
//   prefix_mass    constant d on prefix keys,          constant -d f on all
//   patch_mass     constant d on patch keys,           constant -d f on all
//   self_mass      own d,                              constant -d f on all
//   distance       far d,                              constant -d f on all
//   lse            constant d on all keys
// peak, max_score and argmax, of one key each, have no gradient.
// lse itself is in none of them. Where P_ij is 0, L_ij may be -inf: any finite number will do.
struct AttentionCoefParams {
  int64_t count = 0;  // B * H * Nq
  int64_t stats = 0;  // the planes of rows and drows
  bool has_dlse = false;
  bool has_drows = false;
  const float* dlse = nullptr;   // [count]
  const float* rows = nullptr;   // [popcount(stats), count]
  const float* drows = nullptr;  // the same
  float* coef = nullptr;         // [6, count]
};

struct AttentionBwdParams {
  AttentionScores scores;
  HeadRows v;
  HeadRows out;
  HeadRows dout;
  int64_t num_prefix = 0;
  Positions positions;
  bool has_coef = false;
  const float* lse = nullptr;      // [B, H, Nq]
  const float* lse_low = nullptr;  // [B, H, Nq]
  const float* coef = nullptr;     // [6, B, H, Nq]
  int64_t stride_grad = 0;         // between tokens of dq, dk and dv: H * D, or 3 * H * D if packed
  void* dq = nullptr;              // [B, Nq, H, D]
  void* dk = nullptr;              // [B, Nk, H, D]
  void* dv = nullptr;              // [B, Nk, H, D]
  void* dbias = nullptr;           // as bias, contiguous, or null
  void* dtable = nullptr;          // [T, H] as table, contiguous, or null
  float* dlogit_scale = nullptr;   // [H], or null
};

}  // namespace mimkernels

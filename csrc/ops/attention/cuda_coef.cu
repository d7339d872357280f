#include "cuda/device.cuh"
#include "cuda/vector.cuh"
#include "ops/attention/cuda.h"

namespace mimkernels::cuda {
namespace {

__device__ __forceinline__ int plane_of(int64_t stats, AttentionStat stat) {
  return __popc(static_cast<unsigned>(stats & (stat - 1)));
}

// grid:     blocks of 256 threads; a thread owns one query of one head, then loops
// in:       dlse [B, H, Nq], statistics and their gradients [S, B, H, Nq], fp32, contiguous
// out:      coef fp32 [6, B, H, Nq]; every element written once
// numerics: fp32
// bounds:   offsets are int64
// cost:     inputs read once, outputs written once; no shared memory, no atomics, deterministic
__global__ void __launch_bounds__(kThreads) attention_coef_kernel(AttentionCoefParams p) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.count;
       i += gridDim.x * int64_t{kThreads}) {
    float both = p.has_dlse ? p.dlse[i] : 0.0f;
    float slope = 0.0f, c_prefix = 0.0f, c_patch = 0.0f, a_patch = 0.0f, own = 0.0f, far = 0.0f;
    if (p.has_drows) {
      const auto value = [&](AttentionStat stat) {
        return p.rows[plane_of(p.stats, stat) * p.count + i];
      };
      const auto up = [&](AttentionStat stat) {
        return p.drows[plane_of(p.stats, stat) * p.count + i];
      };
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
        const float mass = value(kPatchMass);
        if (!(mass < kLeastPatchMass)) {
          const float weight = up(kPatchEntropy) / mass;
          a_patch = -weight;
          c_patch = weight * (logf(mass) - value(kPatchEntropy));
        }
      }
      if (p.stats & kPatchMass) {
        c_patch += up(kPatchMass);
        both -= up(kPatchMass) * value(kPatchMass);
      }
    }
    p.coef[i] = both + c_prefix;
    p.coef[p.count + i] = slope;
    p.coef[2 * p.count + i] = both + c_patch;
    p.coef[3 * p.count + i] = slope + a_patch;
    p.coef[4 * p.count + i] = own;
    p.coef[5 * p.count + i] = far;
  }
}

}  // namespace

cudaError_t attention_coef(const AttentionCoefParams& p, cudaStream_t stream) {
  if (p.count == 0) {
    return cudaSuccess;
  }
  return launch(attention_coef_kernel, dim3(blocks_for(p.count, kThreads)), kThreads, 0, stream, p);
}

}  // namespace mimkernels::cuda

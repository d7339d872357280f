// Kernels with a fault each, which are right where `right` is true. The line of a fault ends in
// "// fault"; with several such lines any of them may be named. Those of attention's functions are in
// attention_faults.cuh.
#include <cstring>

#include "cuda/attention/groups.cuh"
#include "cuda/attention/strips.cuh"
#include "exported.h"

namespace {

using mimkernels::cuda::copy_async;
using mimkernels::cuda::copy_async_commit;
using mimkernels::cuda::copy_async_wait;
using mimkernels::cuda::kWarpMask;
using mimkernels::cuda::launch;
using mimkernels::cuda::multiply_add_tf32;
using mimkernels::cuda::to_tf32;

__device__ float* shared_floats() {
  return reinterpret_cast<float*>(mimkernels::cuda::shared_memory());
}

// ---- Races in shared memory ----

__global__ void missing_barrier(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  if (right) {
    __syncthreads();
  }
  out[t] = s[(t + 32) % blockDim.x];  // fault
}

__global__ void missing_barrier_before_write(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  __syncthreads();
  out[t] = s[(t + 1) % blockDim.x];
  if (right) {
    __syncthreads();
  }
  s[t] = 0.0f;  // fault
}

__global__ void two_writers(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[right ? t : t / 2] = in[t];  // fault
  __syncthreads();
  out[t] = s[right ? t : t / 2];
}

__global__ void missing_warp_barrier(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  if (right) {
    __syncwarp();
  }
  out[t] = s[t ^ 1];  // fault
}

__global__ void warp_barrier_for_a_block(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  if (right) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[t] = s[t ^ 32];  // fault
}

__global__ void half_a_warp_barrier(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  __syncwarp(right ? kWarpMask : t % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[t] = s[t ^ 16];  // fault
}

// A meets B, B meets C: then A's write is there for C.
__global__ void missing_link(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  if (t == 0) {
    s[0] = in[0];
    __syncwarp(0b011);
  } else if (t == 1) {
    if (right) {
      __syncwarp(0b011);
      __syncwarp(0b110);
    } else {
      __syncwarp(0b110);
      __syncwarp(0b011);
    }
  } else if (t == 2) {
    __syncwarp(0b110);
    out[0] = s[0];  // fault
  }
}

__global__ void shuffle_for_a_barrier(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  const float other = __shfl_xor_sync(kWarpMask, in[t], 1);
  if (right) {
    __syncwarp();
  }
  out[t] = s[t ^ 1] - other;  // fault
}

__global__ void warp_barrier_before_write(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  __syncwarp();
  out[t] = s[t ^ 1];  // fault
  if (right) {
    __syncwarp();
  }
  s[t] = 2.0f * in[t];  // fault
}

// ---- Shared memory by its bounds and contents ----

__global__ void shared_past_the_end(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[right ? t : t + 1] = in[t];  // fault
  out[t] = 0.0f;
}

__global__ void shared_before_the_start(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[right ? t : t - 1] = in[t];  // fault
  out[t] = 0.0f;
}

__global__ void shared_not_written(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  if (right || t != 5) {
    s[t] = in[t];
  }
  __syncthreads();
  out[t] = s[t];  // fault
}

// Each block finds shared memory as new.
__global__ void shared_of_the_block_before(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  if (right || blockIdx.x == 0) {
    s[t] = in[t];
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + t] = s[t];  // fault
}

// ---- Asynchronous copies ----

__global__ void copy_not_waited_for(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  copy_async(s + 4 * t, in + 4 * t);
  copy_async_commit();
  if (right) {
    copy_async_wait<0>();
  }
  out[t] = s[4 * t];  // fault
}

__global__ void copy_waited_for_too_little(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  copy_async(s + 8 * t, in + 4 * t);
  copy_async_commit();
  copy_async(s + 8 * t + 4, in + 4 * t);
  copy_async_commit();
  if (right) {
    copy_async_wait<0>();
  } else {
    copy_async_wait<1>();
  }
  out[t] = s[8 * t];
  out[t] += s[8 * t + 4];  // fault
}

__global__ void copy_not_committed(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  copy_async(s + 4 * t, in + 4 * t);
  if (right) {
    copy_async_commit();
  }
  copy_async_wait<0>();
  out[t] = s[4 * t];  // fault
}

__global__ void copy_without_barrier(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  copy_async(s + 4 * t, in + 4 * t);
  copy_async_commit();
  copy_async_wait<0>();
  if (right) {
    __syncthreads();
  }
  out[t] = s[4 * (t ^ 1)];  // fault
}

__global__ void copy_overwritten(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  copy_async(s + 4 * t, in + 4 * t);
  copy_async_commit();
  if (right) {
    copy_async_wait<0>();
  }
  s[4 * t] = 1.0f;  // fault
  out[t] = s[4 * t];
}

__global__ void copy_over_what_is_read(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[4 * t] = in[t];
  __syncthreads();
  out[t] = s[4 * (t ^ 1)];  // fault
  if (right) {
    __syncthreads();
  }
  copy_async(s + 4 * t, in + 4 * t);  // fault
}

// ---- Barriers and collectives ----

__global__ void divergent_barrier(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  if (!right && t == 40) {
    return;
  }
  __syncthreads();  // fault
  out[t] = in[t];
}

__global__ void two_kinds_of_barrier(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  if (!right && t >= 32) {
    __syncthreads_or(1);  // fault
  } else {
    __syncthreads();  // fault
  }
  out[t] = in[t];
}

__global__ void barrier_in_half_a_warp(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  if (right || t % 32 < 16) {
    __syncwarp();  // fault
  }
  __syncthreads();  // fault
  out[t] = in[t];
}

__global__ void lane_missing_in_a_shuffle(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  float sum = in[t];
  if (right || t % 32 != 7) {
    sum += __shfl_xor_sync(kWarpMask, sum, 1);  // fault
  }
  out[t] = sum;
}

__global__ void lane_missing_in_a_product(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  const uint32_t weights[4] = {to_tf32(in[t]), 0u, 0u, 0u};
  float sums[4] = {};
  if (right || t % 32 != 7) {
    multiply_add_tf32(sums, weights, to_tf32(in[t]), 0u);  // fault
  }
  out[t] = sums[0];
}

__global__ void lane_at_another_collective(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  if (right || t % 32 != 7) {
    out[t] = __shfl_xor_sync(kWarpMask, in[t], 1);  // fault
  } else {
    out[t] = static_cast<float>(__ballot_sync(kWarpMask, 1));  // fault
  }
}

__global__ void masks_that_differ(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = __shfl_xor_sync(right || t % 32 != 3 ? kWarpMask : 0x0000ffffu, in[t], 1);  // fault
}

__global__ void own_lane_not_in_the_mask(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = __any_sync(right ? kWarpMask : 0x7fffffffu, in[t] > 0.0f);  // fault
}

__global__ void shuffle_from_outside_the_mask(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  if (t % 32 < 16) {
    out[t] = __shfl_sync(0xffffu, in[t], right ? 15 : 16);  // fault
  }
}

// ---- Addresses ----

__global__ void misaligned_load(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = __ldg(reinterpret_cast<const float4*>(in + 4 * t + (right ? 0 : 1))).x;  // fault
}

__global__ void misaligned_store(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  *reinterpret_cast<float4*>(out + 4 * t + (right ? 0 : 2)) = {in[t], 0.0f, 0.0f, 0.0f};  // fault
}

__global__ void misaligned_copy(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  copy_async(shared_floats() + 4 * t, in + 4 * t + (right ? 0 : 2));  // fault
  out[t] = 0.0f;
}

__global__ void null_pointer(bool right, const float* in, float* out) {
  out[threadIdx.x] = (right ? in : nullptr)[threadIdx.x];  // fault
}

__global__ void index_past_a_local_array(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  float values[4] = {};
  const int most = right ? 4 : 5;
  for (int i = 0; i < most; ++i) {
    values[(t + i) % most] += in[i];  // fault
  }
  out[t] = values[t % 4];
}

// ---- Global memory ----

__global__ void global_past_the_end(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = in[right ? t : t + 2 * blockDim.x];  // fault
}

__global__ void global_store_past_the_end(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  out[right ? t : t + 2 * blockDim.x] = in[t];  // fault
}

__global__ void copy_from_past_the_end(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  // Not valid, so nothing is read: the address may be any.
  copy_async(shared_floats() + 4 * t, in + 4 * t + 2 * blockDim.x, !right);  // fault
  copy_async_commit();
  copy_async_wait<0>();
  out[t] = shared_floats()[4 * t];
}

__global__ void two_threads_write(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  out[right ? t : t / 2] = in[t];  // fault
}

__global__ void two_blocks_write(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  out[right ? blockIdx.x * blockDim.x + t : t] = in[t];  // fault
}

__global__ void read_of_another_blocks_write(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  const int b = blockIdx.x;
  const int mine = b * blockDim.x + t;
  out[mine] = right ? in[t] : b == 0 ? 0.0f : out[t];  // fault
}

__global__ void write_over_another_blocks_read(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  const float seen = out[64 + t] + in[t];
  out[blockIdx.x == 0 ? t : right ? 128 + t : 64 + t] = seen;  // fault
}

#include "attention_faults.cuh"

struct Planted {
  const char* name;
  void (*kernel)(bool, const float*, float*);
  int blocks;
  int threads;
  int shared_bytes;
};

#define PLANTED(kernel, blocks, threads, shared_bytes) \
  Planted { #kernel, &kernel, blocks, threads, shared_bytes }
const Planted kPlanted[] = {
    PLANTED(missing_barrier, 1, 64, 256),
    PLANTED(missing_barrier_before_write, 1, 64, 256),
    PLANTED(two_writers, 1, 64, 256),
    PLANTED(missing_warp_barrier, 1, 64, 256),
    PLANTED(warp_barrier_for_a_block, 1, 64, 256),
    PLANTED(half_a_warp_barrier, 1, 64, 256),
    PLANTED(missing_link, 1, 32, 256),
    PLANTED(shuffle_for_a_barrier, 1, 64, 256),
    PLANTED(warp_barrier_before_write, 1, 64, 256),
    PLANTED(shared_past_the_end, 1, 64, 256),
    PLANTED(shared_before_the_start, 1, 64, 256),
    PLANTED(shared_not_written, 1, 64, 256),
    PLANTED(shared_of_the_block_before, 2, 32, 256),
    PLANTED(copy_not_waited_for, 1, 32, 512),
    PLANTED(copy_waited_for_too_little, 1, 32, 1024),
    PLANTED(copy_not_committed, 1, 32, 512),
    PLANTED(copy_without_barrier, 1, 32, 512),
    PLANTED(copy_overwritten, 1, 32, 512),
    PLANTED(copy_over_what_is_read, 1, 32, 512),
    PLANTED(divergent_barrier, 1, 64, 0),
    PLANTED(two_kinds_of_barrier, 1, 64, 0),
    PLANTED(barrier_in_half_a_warp, 1, 64, 0),
    PLANTED(lane_missing_in_a_shuffle, 1, 64, 0),
    PLANTED(lane_missing_in_a_product, 1, 64, 0),
    PLANTED(lane_at_another_collective, 1, 64, 0),
    PLANTED(masks_that_differ, 1, 64, 0),
    PLANTED(own_lane_not_in_the_mask, 1, 64, 0),
    PLANTED(shuffle_from_outside_the_mask, 1, 64, 0),
    PLANTED(misaligned_load, 1, 32, 0),
    PLANTED(misaligned_store, 1, 32, 0),
    PLANTED(misaligned_copy, 1, 32, 512),
    PLANTED(null_pointer, 1, 64, 0),
    PLANTED(index_past_a_local_array, 1, 64, 0),
    PLANTED(global_past_the_end, 1, 128, 0),
    PLANTED(global_store_past_the_end, 1, 128, 0),
    PLANTED(copy_from_past_the_end, 1, 32, 512),
    PLANTED(two_threads_write, 1, 64, 0),
    PLANTED(two_blocks_write, 2, 64, 0),
    PLANTED(read_of_another_blocks_write, 2, 64, 0),
    PLANTED(write_over_another_blocks_read, 2, 64, 0),
    PLANTED(rows_not_waited_for, 1, 32, 1280),
    PLANTED(rows_past_their_place, 1, 32, 1280),
    PLANTED(rows_over_fragments, 1, 64, 1280),
    PLANTED(keys_without_barrier, 1, 64, 1280),
    PLANTED(values_without_barrier, 1, 64, 1280),
    PLANTED(strip_stored_too_early, 1, 32, 1280),
    PLANTED(points_without_barrier, 1, 32, 128),
    PLANTED(group_read_too_early, 1, 64, 512),
    PLANTED(group_stored_over, 1, 64, 512),
    PLANTED(columns_read_too_early, 1, 64, 256),
    PLANTED(left_rows_not_waited_for, 1, 32, 16 * kHalfStride * 2),
    PLANTED(left_rows_past_the_end, 1, 32, 0),
};

}  // namespace

EXPORTED int fault_count() { return sizeof(kPlanted) / sizeof(kPlanted[0]); }
EXPORTED const char* fault_name(int which) { return kPlanted[which].name; }
EXPORTED const char* run_fault(int which, bool right, const float* in, float* out) {
  const Planted& p = kPlanted[which];
  return error_of([&] {
    return launch(p.kernel, dim3(p.blocks), p.threads, p.shared_bytes, nullptr, right, in, out);
  });
}
// What no device starts, by its number of threads and bytes of shared memory.
EXPORTED const char* run_refused(int threads, int shared_bytes, const float* in, float* out) {
  return error_of([&] {
    return launch(&two_blocks_write, dim3(1), threads, shared_bytes, nullptr, true, in, out);
  });
}

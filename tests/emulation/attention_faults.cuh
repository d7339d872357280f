// Part of faults.cu, in its namespace: faults around the functions that attention's kernels share.

// ---- Strips of attention: 16 rows of 32 fp16 numbers ----

constexpr int kDim = 32;
constexpr int kStride = mimkernels::cuda::row_stride<__half>(kDim);

__device__ __half* shared_halves() {
  return reinterpret_cast<__half*>(mimkernels::cuda::shared_memory());
}

__device__ __forceinline__ void start_rows(const float* in, int count) {
  mimkernels::cuda::copy_rows<4>(shared_halves(), kStride, reinterpret_cast<const __half*>(in),
                                 kDim, count, 16, kDim, static_cast<int>(threadIdx.x),
                                 static_cast<int>(blockDim.x));
  copy_async_commit();
}

__global__ void rows_not_waited_for(bool right, const float* in, float* out) {
  start_rows(in, 16);
  if (right) {
    copy_async_wait<0>();
  }
  __syncwarp();
  uint32_t left[1][2][4];
  mimkernels::cuda::load_left(left, shared_halves(), kStride);  // fault
  out[threadIdx.x] = __uint_as_float(left[0][1][3]);
}

__global__ void rows_past_their_place(bool right, const float* in, float* out) {
  start_rows(in, right ? 16 : 17);  // fault
  copy_async_wait<0>();
  out[threadIdx.x] = 0.0f;
}

__global__ void rows_over_fragments(bool right, const float* in, float* out) {
  start_rows(in, 16);
  copy_async_wait<0>();
  __syncthreads();
  uint32_t left[1][2][4];
  mimkernels::cuda::load_left(left, shared_halves(), kStride);  // fault
  if (right) {
    __syncthreads();
  }
  start_rows(in, 16);  // fault
  copy_async_wait<0>();
  out[threadIdx.x] = __uint_as_float(left[0][1][3]);
}

__global__ void keys_without_barrier(bool right, const float* in, float* out) {
  start_rows(in, 16);
  copy_async_wait<0>();
  if (right) {
    __syncthreads();
  }
  const uint32_t left[2][2][4] = {};
  float d[2][1][2][4];
  const __half* const row = mimkernels::cuda::right_row(shared_halves(), kStride);
  mimkernels::cuda::multiply_strips<__half>(d, left, row, kStride);  // fault
  out[threadIdx.x] = d[1][0][1][3];
}

__global__ void values_without_barrier(bool right, const float* in, float* out) {
  start_rows(in, 16);
  copy_async_wait<0>();
  if (right) {
    __syncthreads();
  }
  const float zeros[2][4] = {};
  uint32_t weights[2][4];
  mimkernels::cuda::pack_group<__half>(weights[0], zeros);
  mimkernels::cuda::pack_group<__half>(weights[1], zeros);
  float acc[2][4][4] = {};
  const __half* const row = mimkernels::cuda::left_row(shared_halves(), kStride);
  mimkernels::cuda::add_weighted_strips(acc, weights, row);  // fault
  out[threadIdx.x] = acc[1][3][3];
}

__global__ void strip_stored_too_early(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  for (int i = 0; i < 16; ++i) {
    shared_halves()[t / 2 * kStride + t % 2 * 16 + i] = __float2half_rn(in[t]);
  }
  if (right) {
    __syncwarp();
  }
  __half* const to = reinterpret_cast<__half*>(out);
  mimkernels::cuda::store_rows<4, 16>(to, kDim, shared_halves(), kStride, 16, kDim);  // fault
}

__global__ void points_without_barrier(bool right, const float* in, float* out) {
  const int t = threadIdx.x;
  float2* const points = reinterpret_cast<float2*>(mimkernels::cuda::shared_memory());
  if (t < 16) {
    points[t] = make_float2(in[t], 0.0f);
  }
  if (right) {
    __syncwarp();
  }
  float d[2][4];
  mimkernels::cuda::point_distances(d, points, 16, 1, 15, 0, 0);  // fault
  out[t] = d[1][3];
}

// ---- Operands of attention that other warps or copies write ----

using Half = __half;
constexpr int kHalfStride = mimkernels::cuda::row_stride<Half>(16);

__global__ void group_read_too_early(bool right, const float* in, float* out) {
  Half* const group = reinterpret_cast<Half*>(mimkernels::cuda::shared_memory());
  const int t = threadIdx.x;
  const uint32_t packed[4] = {__float_as_uint(in[t]), 1, 2, 3};
  if (t < 32) {
    mimkernels::cuda::store_group(group, packed);
  }
  if (right) {
    __syncthreads();
  }
  if (t >= 32) {
    uint32_t left[4];
    mimkernels::cuda::load_transposed_group(left, group);  // fault
    out[t] = __uint_as_float(left[0]);
  }
}

__global__ void group_stored_over(bool right, const float* in, float* out) {
  Half* const group = reinterpret_cast<Half*>(mimkernels::cuda::shared_memory());
  const int t = threadIdx.x;
  const uint32_t packed[4] = {__float_as_uint(in[t]), 1, 2, 3};
  if (t < 32) {
    mimkernels::cuda::store_group(group, packed);
  }
  __syncthreads();
  uint32_t left[4];
  mimkernels::cuda::load_transposed_group(left, group);  // fault
  out[t] = __uint_as_float(left[0]);
  if (right) {
    __syncthreads();
  }
  if (t >= 32) {
    mimkernels::cuda::store_group(group, packed);  // fault
  }
}

__global__ void columns_read_too_early(bool right, const float* in, float* out) {
  float* const s = shared_floats();
  const int t = threadIdx.x;
  s[t] = in[t];
  if (right) {
    __syncthreads();
  }
  float x[4];
  mimkernels::cuda::load_columns(x, s + t / 16 * 16);  // fault
  out[t] = x[0] + x[1] + x[2] + x[3];
}

__global__ void left_rows_not_waited_for(bool right, const float* in, float* out) {
  Half* const rows = reinterpret_cast<Half*>(mimkernels::cuda::shared_memory());
  const int t = threadIdx.x;
  copy_async(rows + t / 2 * kHalfStride + t % 2 * 8, in + 4 * t);
  copy_async_commit();
  if (right) {
    copy_async_wait<0>();
  }
  __syncwarp();
  const mimkernels::cuda::LeftKeys<Half, 1, 1, false> left(rows, kHalfStride, 0, 1);
  float d[1][2][4] = {};
  mimkernels::cuda::add_strip_products<Half, 1>(d, rows, kHalfStride, left);  // fault
  out[t] = d[0][0][0];
}

__global__ void left_rows_past_the_end(bool right, const float* in, float* out) {
  uint32_t left[2][1][4];
  mimkernels::cuda::fetch_left(left, reinterpret_cast<const Half*>(in), 16,  // fault
                               right ? 16 : 32, 16, true);                   // fault
  out[threadIdx.x] = __uint_as_float(left[0][0][0]);
}

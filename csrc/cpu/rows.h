// Whole rows of features: copied, added, zeroed and summed. The building blocks of the token ops.
#pragma once

#include <cstdlib>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/params.h"
#include "core/status.h"
#include "cpu/vec.h"

namespace mimkernels::MIMKERNELS_ISA {

// Outputs from this size on bypass the cache: the next op would not find them there anyway, and a
// plain store first reads the line that it is about to overwrite. Below, plain stores are as fast
// and leave the output in the cache for the op that reads it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
// The least work, in bytes moved, that is worth a thread.
constexpr int64_t kGrainBytes = int64_t{256} << 10;

// Streaming needs whole cache lines: a partly written line costs more than a plain store.
MIMKERNELS_INLINE bool may_stream(const void* out, int64_t total_bytes, int64_t row_bytes) {
  return total_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

MIMKERNELS_INLINE int64_t grain_for(int64_t bytes_per_item) {
  return max_of(1, kGrainBytes / max_of(1, bytes_per_item));
}

// Calls body(begin, end) on the pool.
template <typename Body>
MIMKERNELS_INLINE void run_parallel(ParallelFor parallel_for, int64_t count, int64_t grain,
                                    const Body& body) {
  if (count <= 0) return;
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
        stream_fence();
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Scratch memory in whole cache lines that frees itself; null when the system has none left.
template <typename T>
class Scratch {
 public:
  // rows * columns elements; a product that overflows counts as out of memory.
  explicit Scratch(int64_t rows, int64_t columns = 1) {
    int64_t bytes = 0;
    if (__builtin_mul_overflow(rows, columns, &bytes) ||
        __builtin_mul_overflow(bytes, static_cast<int64_t>(sizeof(T)), &bytes)) {
      return;
    }
    if (bytes > INT64_MAX - kLine) return;
    const int64_t lines = max_of(1, ceil_div(bytes, kLine));
    data_ = static_cast<T*>(aligned_alloc(kLine, static_cast<size_t>(lines * kLine)));
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  bool failed() const { return data_ == nullptr; }

 private:
  static constexpr int64_t kLine = 64;

  T* data_ = nullptr;
};

MIMKERNELS_INLINE Status out_of_memory() {
  Status status;
  status.code = StatusCode::kOutOfMemory;
  return status;
}

MIMKERNELS_INLINE Status unsupported() {
  Status status;
  status.code = StatusCode::kUnsupported;
  return status;
}

// Every id in [0, limit)? Run before any output is written.
MIMKERNELS_INLINE Status check_ids(const Ids& ids, int64_t masks, int64_t batch, int64_t kept,
                                   int64_t limit) {
  Status status;
  const uint64_t end = static_cast<uint64_t>(limit);
  for (int64_t m = 0; m < masks; ++m) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t* row = ids.data + m * ids.stride0 + b * ids.stride1;
      uint64_t bad = 0;
      for (int64_t k = 0; k < kept; ++k) {
        bad |= static_cast<uint64_t>(static_cast<uint64_t>(row[k]) >= end);
      }
      if (bad == 0) continue;
      for (int64_t k = 0; k < kept; ++k) {
        if (static_cast<uint64_t>(row[k]) < end) continue;
        status.code = StatusCode::kIdOutOfRange;
        status.position[0] = m;
        status.position[1] = b;
        status.position[2] = k;
        status.value = row[k];
        status.limit = limit;
        return status;
      }
    }
  }
  return status;
}

template <typename T>
MIMKERNELS_INLINE const T* row_at(const Rows& rows, int64_t i, int64_t j) {
  return static_cast<const T*>(rows.data) + i * rows.stride0 + j * rows.stride1;
}

template <bool kStream, int N, typename T>
MIMKERNELS_INLINE void put(T* dst, const Pack<N>& value) {
  if constexpr (kStream) {
    stream<N>(dst, value);
  } else {
    store<N>(dst, value);
  }
}

// Whole registers of a row, or its last n elements.
template <int N, bool kWhole, typename T>
MIMKERNELS_INLINE Pack<N> load_columns(const T* src, int64_t n) {
  if constexpr (kWhole) {
    return load<N>(src);
  } else {
    return load_some<N>(src, n);
  }
}

template <int N, bool kWhole, bool kStream, typename T>
MIMKERNELS_INLINE void store_columns(T* dst, const Pack<N>& value, int64_t n) {
  if constexpr (kWhole) {
    put<kStream>(dst, value);
  } else {
    store_some<N>(dst, value, n);
  }
}

MIMKERNELS_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// The first lines of a row: the hardware prefetcher notices it too late, but follows from there.
constexpr int64_t kRowHead = 512;
// A whole row, for passes whose arithmetic leaves the hardware prefetcher behind.
constexpr int64_t kWholeRow = 4096;

MIMKERNELS_INLINE void prefetch_row(const void* row, int64_t bytes, int64_t limit) {
  const char* line = static_cast<const char*>(row);
  const int64_t ahead = min_of(bytes, limit);
  for (int64_t at = 0; at < ahead; at += 64) prefetch(line + at);
}

template <bool kStream, typename T>
MIMKERNELS_INLINE void copy_row(T* dst, const T* src, int64_t n) {
  if constexpr (kStream) {
    using U = typename VecTypes<kLanes>::U;
    constexpr int64_t kStep = static_cast<int64_t>(sizeof(U));
    const char* from = reinterpret_cast<const char*>(src);
    char* to = reinterpret_cast<char*>(dst);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < bytes; i += 64) {
      MIMKERNELS_UNROLL
      for (int64_t j = 0; j < 64; j += kStep) {
        U bits;
        memcpy(&bits, from + i + j, sizeof(bits));
        stream_bits(to + i + j, bits);
      }
    }
  } else {
    memcpy(dst, src, static_cast<size_t>(n) * sizeof(T));
  }
}

template <bool kStream, typename T>
MIMKERNELS_INLINE void zero_row(T* dst, int64_t n) {
  if constexpr (kStream) {
    using U = typename VecTypes<kLanes>::U;
    const U zero = {};
    char* to = reinterpret_cast<char*>(dst);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < bytes; i += static_cast<int64_t>(sizeof(U))) stream_bits(to + i, zero);
  } else {
    memset(dst, 0, static_cast<size_t>(n) * sizeof(T));
  }
}

// dst = a + b, added in fp32 and rounded once.
template <bool kStream, typename T>
MIMKERNELS_INLINE void add_rows(T* dst, const T* a, const T* b, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) put<kStream>(dst + i, load<16>(a + i) + load<16>(b + i));
  if (i < n)
    store_some<16>(dst + i, load_some<16>(a + i, n - i) + load_some<16>(b + i, n - i), n - i);
}

// acc = row, acc += row, row = acc: fp32 accumulators beside rows of any float type.
template <typename T>
MIMKERNELS_INLINE void set_acc(float* acc, const T* row, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store<16>(acc + i, load<16>(row + i));
  if (i < n) store_some<16>(acc + i, load_some<16>(row + i, n - i), n - i);
}

template <typename T>
MIMKERNELS_INLINE void add_to_acc(float* acc, const T* row, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store<16>(acc + i, load<16>(acc + i) + load<16>(row + i));
  if (i < n) {
    store_some<16>(acc + i, load_some<16>(acc + i, n - i) + load_some<16>(row + i, n - i), n - i);
  }
}

template <bool kStream, typename T>
MIMKERNELS_INLINE void round_acc(T* dst, const float* acc, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) put<kStream>(dst + i, load<16>(acc + i));
  if (i < n) store_some<16>(dst + i, load_some<16>(acc + i, n - i), n - i);
}

// sums[l] += value[l], in double.
template <int L>
MIMKERNELS_INLINE void add_lanes(double* sums, typename VecTypes<L>::F value) {
  constexpr int H = L / 2;  // as many doubles as fill a register
  typename VecTypes<H>::F halves[2];
  memcpy(halves, &value, sizeof(value));
  MIMKERNELS_UNROLL
  for (int h = 0; h < 2; ++h) {
    typename VecTypes<H>::D sum;
    memcpy(&sum, sums + h * H, sizeof(sum));
    sum += __builtin_convertvector(halves[h], typename VecTypes<H>::D);
    memcpy(sums + h * H, &sum, sizeof(sum));
  }
}

// sums += row, in double, of a row of any float type or of sums.
template <typename T>
MIMKERNELS_INLINE void add_to_sums(double* sums, const T* row, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_lanes<kLanes>(sums + i, load_part<kLanes>(row + i));
  if (i == n) return;
  alignas(64) float rest[kLanes];
  store<kLanes>(rest, load_some<kLanes>(row + i, n - i));
  for (int64_t l = 0; i + l < n; ++l) sums[i + l] += static_cast<double>(rest[l]);
}

MIMKERNELS_INLINE void add_to_sums(double* sums, const double* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += row[i];
}

// row = sums, through fp32.
template <bool kStream, typename T>
MIMKERNELS_INLINE void round_sums(T* row, const double* sums, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    alignas(64) float part[16] = {};
    const int64_t lanes = min_of(16, n - i);
    for (int64_t l = 0; l < lanes; ++l) part[l] = static_cast<float>(sums[i + l]);
    if (lanes == 16) {
      put<kStream>(row + i, load<16>(part));
    } else {
      store_some<16>(row + i, load<16>(part), lanes);
    }
  }
}

// Sums rows into one, a tile of at most kTile columns at a time. In double: what remains of a sum
// of numbers that cancel is as exact as any other, however many they are.
class RowSum {
 public:
  static constexpr int64_t kTile = 1024;

  MIMKERNELS_INLINE void reset(int64_t n) {
    for (int64_t i = 0; i < n; ++i) sums_[i] = 0.0;
  }

  template <typename T>
  MIMKERNELS_INLINE void add(const T* row, int64_t n) {
    add_to_sums(sums_, row, n);
  }

  MIMKERNELS_INLINE const double* total() const { return sums_; }

 private:
  alignas(64) double sums_[kTile];
};

// out[o, :] = the sum over i < count of row_at(o, i), a null row counting as zeros. Split into chunks
// that depend on the shape alone, so that few outputs over many rows still use every thread and the
// bits do not depend on how many there are.
template <typename T, typename In, typename RowAt>
MIMKERNELS_INLINE Status sum_rows(ParallelFor parallel_for, int64_t outputs, int64_t count,
                                  int64_t dim, T* out, In, const RowAt& row_at) {
  constexpr int64_t kTile = RowSum::kTile;
  const int64_t tiles = ceil_div(dim, kTile);
  const int64_t wanted = outputs >= 64 ? 1 : ceil_div(64, max_of(outputs, 1));
  const int64_t chunks = max_of(1, min_of(wanted, count / 32));
  const int64_t chunk = ceil_div(count, chunks);
  Scratch<double> partial(chunks > 1 ? chunks * outputs : 0, dim);
  if (partial.failed()) return out_of_memory();
  const int64_t chunk_bytes = chunk * min_of(dim, kTile) * static_cast<int64_t>(sizeof(In));
  run_parallel(parallel_for, outputs * chunks * tiles, grain_for(chunk_bytes),
               [&](int64_t begin, int64_t end) {
                 RowSum sum;
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t at = (task % tiles) * kTile;
                   const int64_t n = min_of(kTile, dim - at);
                   const int64_t c = task / tiles % chunks;
                   const int64_t o = task / tiles / chunks;
                   const int64_t stop = min_of(count, (c + 1) * chunk);
                   sum.reset(n);
                   for (int64_t i = c * chunk; i < stop; ++i) {
                     const In* row = row_at(o, i);
                     if (row != nullptr) sum.add(row + at, n);
                   }
                   if (chunks > 1) {
                     memcpy(partial.get() + (c * outputs + o) * dim + at, sum.total(),
                            static_cast<size_t>(n) * sizeof(double));
                   } else {
                     round_sums<false>(out + o * dim + at, sum.total(), n);
                   }
                 }
               });
  if (chunks == 1) return Status{};
  run_parallel(parallel_for, outputs * tiles, grain_for(chunks * min_of(dim, kTile) * 8),
               [&](int64_t begin, int64_t end) {
                 RowSum sum;
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t at = (task % tiles) * kTile;
                   const int64_t n = min_of(kTile, dim - at);
                   const int64_t o = task / tiles;
                   sum.reset(n);
                   for (int64_t c = 0; c < chunks; ++c) {
                     sum.add(partial.get() + (c * outputs + o) * dim + at, n);
                   }
                   round_sums<false>(out + o * dim + at, sum.total(), n);
                 }
               });
  return Status{};
}

// Calls body(T{}) with the element type of a float dtype.
template <typename Body>
MIMKERNELS_INLINE Status with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(bf16{});
    case DType::kFloat16:
      return body(fp16{});
    default:
      return unsupported();
  }
}

}  // namespace mimkernels::MIMKERNELS_ISA

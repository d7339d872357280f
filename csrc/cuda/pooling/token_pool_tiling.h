// How blocks of the poolings work; plain C++, which the tests' resource table calls too.
#pragma once

#include <cstdint>

namespace mimkernels::cuda {

constexpr int kPoolWarps = 4;    // of pool_chunk_kernel
constexpr int kMatrixWarps = 4;  // of the products on tensor cores

// Shared memory of pool_chunk_kernel: the queries in 16-byte words, the sums of each warp, and two
// numbers for each warp and query.
inline int pool_chunk_bytes(int64_t queries, int64_t dim, int64_t words) {
  return static_cast<int>(queries * words * 16 +
                          kPoolWarps * (dim + 2 * queries) * int64_t{sizeof(float)});
}

}  // namespace mimkernels::cuda

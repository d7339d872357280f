// The products of token_products.h on tensor cores, for 16-bit tokens that meet many vectors, none
// of them sliced. Tokens and vectors are aligned to 16 bytes.
#pragma once

#include "cuda/pooling/token_products.h"

namespace mimkernels::cuda {

// Vectors from which on tensor cores are used: fewer leave most rows of a product empty.
constexpr int64_t kLeastMatrixGroups = 16;
// Tokens up to which 32 bits count the weights of a warp's vectors.
constexpr int64_t kMostMatrixTokens = int64_t{1} << 24;

inline bool takes_matrices(const TokenProducts& p) {
  return p.dtype != DType::kFloat32 && p.groups >= kLeastMatrixGroups &&
         p.tokens <= kMostMatrixTokens;
}

// The functions of token_products.h without "matrix"; there is something to write.
cudaError_t matrix_token_dots(const TokenProducts& p, const Rows& vectors, float* out,
                              cudaStream_t stream);
cudaError_t matrix_weigh_tokens(const TokenProducts& p, const float* weights, void* out,
                                bool to_float, cudaStream_t stream);
cudaError_t matrix_spread_tokens(const TokenProducts& p, const TokenSpread& first,
                                 const TokenSpread& second, void* out, cudaStream_t stream);

}  // namespace mimkernels::cuda

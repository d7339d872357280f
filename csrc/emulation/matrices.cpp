// Matrix fragments: what device.cuh says of load_matrices and multiply_add, lane by lane.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>

#include "emulation/engine.h"

namespace mimkernels::emulation {

namespace {

// A sum in double, which holds every product exactly, as a matrix unit leaves it in fp32: truncated,
// not rounded. That is what devices were found to do (Fasi et al., 2021), and the worse of the two.
float truncate(double sum) {
  const float rounded = static_cast<float>(sum);
  if (std::isnan(sum) || std::fabs(sum) >= 0x1p128) {
    return rounded;
  }
  return std::fabs(static_cast<double>(rounded)) > std::fabs(sum) ? std::nextafterf(rounded, 0.0f)
                                                                  : rounded;
}

// d += a b of 16xDEPTH and DEPTHx8 matrices.
template <int DEPTH>
void multiply(const double (&a)[16][DEPTH], const double (&b)[DEPTH][8],
              Product* const (&lanes)[kWarpSize]) {
  for (int row = 0; row < 16; ++row) {
    double sums[8] = {};
    for (int k = 0; k < DEPTH; ++k) {
      for (int column = 0; column < 8; ++column) {
        sums[column] += a[row][k] * b[k][column];
      }
    }
    for (int column = 0; column < 8; ++column) {
      float& d = lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2];
      d = truncate(sums[column] + static_cast<double>(d));
    }
  }
}

template <typename Format>
void multiply_add_16(Product* const (&lanes)[kWarpSize]) {
  double a[16][16];
  double b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const auto value = [half](uint32_t word) {
        return static_cast<double>(Format::value(static_cast<uint16_t>(word >> 16 * half)));
      };
      for (int r = 0; r < 4; ++r) {
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = value(lanes[lane]->a[r]);
      }
      b[2 * t + half][g] = value(lanes[lane]->b0);
      b[2 * t + 8 + half][g] = value(lanes[lane]->b1);
    }
  }
  multiply<16>(a, b, lanes);
}

void multiply_add_tf32(Product* const (&lanes)[kWarpSize]) {
  double a[16][8];
  double b[8][8];
  const auto value = [](uint32_t bits) {
    return static_cast<double>(__uint_as_float(bits & ~0x1fffu));
  };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      a[g + r % 2 * 8][t + r / 2 * 4] = value(lanes[lane]->a[r]);
    }
    b[t][g] = value(lanes[lane]->b0);
    b[t + 4][g] = value(lanes[lane]->b1);
  }
  multiply<8>(a, b, lanes);
}

}  // namespace

void load_matrices(bool transposed, Matrices* const (&lanes)[kWarpSize]) {
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      __builtin_memcpy(matrix[row], lanes[m * 8 + row]->row, 16);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4;
      const int t = 2 * (lane % 4);
      const uint32_t low = transposed ? matrix[t][g] : matrix[g][t];
      const uint32_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      lanes[lane]->r[m] = low | high << 16;
    }
  }
}

void multiply_add(Wait kind, Product* const (&lanes)[kWarpSize]) {
  switch (kind) {
    case Wait::kMultiplyAddHalf:
      return multiply_add_16<floats::HalfFormat>(lanes);
    case Wait::kMultiplyAddBFloat16:
      return multiply_add_16<floats::BFloat16Format>(lanes);
    default:
      return multiply_add_tf32(lanes);
  }
}

}  // namespace mimkernels::emulation

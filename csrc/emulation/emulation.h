// Runs CUDA kernels on the host, thread by thread, and finds their faults. See README.md.
//
// This is what the headers that stand in for CUDA's call; kernels do not include it themselves.
// Every function below but `run` is called from inside a kernel, by the thread that it concerns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mimkernels::emulation {

struct Index {
  unsigned x, y, z;
};

// What all threads of a launch share.
struct Launch {
  const void* kernel;  // its address, for messages
  Index grid;
  int threads;
  int shared_bytes;
  void (*enter)(void* arguments);  // calls the kernel
  void* arguments;
};

constexpr int kWarpSize = 32;
constexpr int kMostThreads = 1024;
// What a block may have on every device that runs sm_80 code (8.6, 8.9 and 12.0 have the least).
constexpr int kMostSharedBytes = 99 * 1024;

// What threads wait for together.
enum class Wait : uint8_t {
  kNothing,
  kExited,
  kBlock,
  kBlockAnd,
  kBlockOr,
  kBlockCount,
  kWarp,
  kBallot,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyAddHalf,
  kMultiplyAddBFloat16,
  kMultiplyAddTf32,
};

// Runs the kernel to its end. Throws std::runtime_error with what, where and who at the first
// fault.
void run(const Launch& launch);

// They never change within a thread, so the compiler may ask once.
Index thread_index() __attribute__((const));
Index block_index() __attribute__((const));
Index block_size() __attribute__((const));
Index grid_size() __attribute__((const));

// __syncthreads and its votes: kBlock, kBlockAnd, kBlockOr or kBlockCount.
int wait_for_block(Wait kind, int predicate);
void wait_for_warp(unsigned mask);
unsigned ballot(unsigned mask, bool predicate);
// `value` of another lane; kind is one of kShuffle*.
uint64_t shuffle(Wait kind, unsigned mask, uint64_t value, int argument, int width);

unsigned char* shared_memory();
void copy_async(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);
// kLoadMatrices or kLoadMatricesTransposed.
void load_matrices(Wait kind, uint32_t* r, const void* row);
// One of kMultiplyAdd*.
void multiply_add(Wait kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);

}  // namespace mimkernels::emulation

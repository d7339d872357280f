// What the parts of the engine share: the threads of the block that runs, and how a fault leaves
// it.
#pragma once

#include <string>
#include <vector>

#include "emulation/emulation.h"

namespace mimkernels::emulation {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = size_t{64} << 20;

// 16 bytes on their way to shared memory.
struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
  int group;
};

// A device thread: a fiber with a stack of its own.
struct Thread {
  void* stack_pointer;
  const unsigned char* stack;
  int number;  // in the block
  int lane;
  int warp;
  Wait wait;
  uint32_t mask;       // of the lanes it waits for
  void* operands;      // what it brought to the meeting
  const void* caller;  // where in the kernel it waits
  int predicate;
  int groups;  // of asynchronous copies, closed
  std::vector<Copy> copies;
  // How far this thread has seen each lane of its warp: what lane l did before its clock[l] grew
  // past our clock[l] happened before what we do now.
  uint32_t clock[kWarpSize];
};

struct Engine {
  const Launch* launch = nullptr;
  Index block = {};
  Thread* threads = nullptr;
  Thread* current = nullptr;  // null while no kernel code runs
  void* scheduler = nullptr;  // its stack pointer while a thread runs
  bool busy = false;          // the engine itself calls memcpy
  unsigned char* stacks = nullptr;
  unsigned char* shared = nullptr;
  // Counts the spans between block barriers, over all blocks of all launches.
  uint32_t epoch = 0;
  uint32_t block_epoch = 0;
  uint32_t launch_epoch = 0;
};

extern Engine engine;

// The first fault of a launch.
struct Fault {
  bool found = false;
  int thread = -1;
  std::string text;
  const void* caller = nullptr;
  const void* other = nullptr;  // where the other side of a conflict was
};

extern Fault fault;

// Notes the fault and ends the launch: leaves the thread that runs, or throws Stop.
struct Stop {};
[[noreturn]] void fail(const Thread* thread, const void* caller, std::string text,
                       const void* other = nullptr);
std::string describe(const Fault& fault);
// A fault of the host code around kernels cannot be thrown where it is found: the next launch does.
extern std::string pending;
const char* name_of(Wait wait);

// Notes an access by `thread`, and fails if it is one that the kernel must not make.
void check_read(Thread& thread, const void* from, size_t bytes, const void* caller);
void check_write(Thread& thread, void* to, size_t bytes, const void* caller);
// An asynchronous copy to shared memory: started, then done.
void check_copy(Thread& thread, void* to, const void* caller);
void finish_copy(Thread& thread, void* to);
bool is_shared(const void* address);
// Before a launch: what earlier launches did no longer matters.
void forget_accesses();

// What the lanes of a warp do together; operands by lane.
struct Matrices {
  uint32_t* r;
  const unsigned char* row;
};
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};
void load_matrices(bool transposed, Matrices* const (&lanes)[kWarpSize]);
void multiply_add(Wait kind, Product* const (&lanes)[kWarpSize]);

}  // namespace mimkernels::emulation

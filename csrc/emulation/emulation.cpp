// Threads as fibers, and where they meet: barriers, votes, shuffles.
#include "emulation/emulation.h"

#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "emulation/engine.h"
#include "emulation/fiber.h"

namespace mimkernels::emulation {

Engine engine;
Fault fault;
std::string pending;

namespace {

struct Vote {
  bool predicate;
  unsigned result;
};

struct Shuffled {
  uint64_t value;
  int argument;
  int width;
  uint64_t result;
};

int warps() { return (engine.launch->threads + kWarpSize - 1) / kWarpSize; }

[[noreturn]] void enter_thread() {
  engine.launch->enter(engine.launch->arguments);
  engine.current->wait = Wait::kExited;
  void* gone;
  switch_stack(&gone, engine.scheduler);
  __builtin_unreachable();
}

unsigned char* reserve(size_t bytes, int protection) {
  void* const memory =
      mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return static_cast<unsigned char*>(memory);
}

void prepare() {
  if (engine.threads != nullptr) {
    return;
  }
  // Below each stack lies a page that ends the process: nothing can be mended after an overflow.
  engine.stacks = reserve(kMostThreads * kStackBytes, PROT_READ | PROT_WRITE);
  engine.threads = new Thread[kMostThreads]();
  for (int t = 0; t < kMostThreads; ++t) {
    unsigned char* const stack = engine.stacks + t * kStackBytes;
    mprotect(stack, 4096, PROT_NONE);
    engine.threads[t].stack = stack;
    engine.threads[t].number = t;
    engine.threads[t].lane = t % kWarpSize;
    engine.threads[t].warp = t / kWarpSize;
  }
  // Around shared memory nothing else, so that an access beside it is known for what it is. It lies
  // on 16 bytes and on no more, as promised to kernels.
  const size_t arena = (kMostSharedBytes + 16 + 4095) / 4096 * 4096;
  unsigned char* const region = reserve(kGuardBytes + arena + kGuardBytes, PROT_NONE);
  mprotect(region + kGuardBytes, arena, PROT_READ | PROT_WRITE);
  engine.shared = region + kGuardBytes + 16;
}

void resume(Thread& thread) {
  engine.current = &thread;
  switch_stack(&engine.scheduler, thread.stack_pointer);
  engine.current = nullptr;
  if (fault.found) {
    throw Stop();
  }
}

// Called by a thread: sleeps until the scheduler has done what `wait` stands for.
void wait_for(Wait wait, unsigned mask, void* operands, const void* caller) {
  Thread& self = *engine.current;
  if (wait > Wait::kBlockCount && (mask >> self.lane & 1u) == 0) {
    fail(&self, caller,
         std::string("calls ") + name_of(wait) + " with a mask without its own lane");
  }
  self.wait = wait;
  self.mask = mask;
  self.operands = operands;
  self.caller = caller;
  switch_stack(&self.stack_pointer, engine.scheduler);
}

template <typename T>
T& operands_of(Thread* lanes, int lane) {
  return *static_cast<T*>(lanes[lane].operands);
}

void join_clocks(Thread* lanes, unsigned mask) {
  uint32_t joined[kWarpSize] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1u) {
      for (int l = 0; l < kWarpSize; ++l) {
        joined[l] = joined[l] < lanes[lane].clock[l] ? lanes[lane].clock[l] : joined[l];
      }
    }
  }
  uint32_t next = 0;  // the same for all, so that one number can stand for a set of lanes
  for (const uint32_t clock : joined) {
    next = next < clock ? clock : next;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1u) {
      memcpy(lanes[lane].clock, joined, sizeof(joined));
      lanes[lane].clock[lane] = next + 1;
    }
  }
}

void do_ballot(Thread* lanes, unsigned mask) {
  unsigned result = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1u) {
      result |= static_cast<unsigned>(operands_of<Vote>(lanes, lane).predicate) << lane;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1u) {
      operands_of<Vote>(lanes, lane).result = result;
    }
  }
}

void do_shuffle(Wait kind, Thread* lanes, unsigned mask) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) == 0) {
      continue;
    }
    Shuffled& own = operands_of<Shuffled>(lanes, lane);
    const int first = lane & -own.width;
    const int last = first + own.width - 1;
    int from = lane;
    switch (kind) {
      case Wait::kShuffle:
        from = first + (own.argument & (own.width - 1));
        break;
      case Wait::kShuffleUp:
        from = lane - own.argument < first ? lane : lane - own.argument;
        break;
      case Wait::kShuffleDown:
        from = lane + own.argument > last ? lane : lane + own.argument;
        break;
      default:
        // Lanes of an earlier segment may be read, those of a later one not.
        from = (lane ^ own.argument) > last ? lane : lane ^ own.argument;
    }
    if ((mask >> from & 1u) == 0) {
      fail(&lanes[lane], lanes[lane].caller,
           std::string(name_of(kind)) + " reads lane " + std::to_string(from) +
               ", which is not in the mask");
    }
    own.result = operands_of<Shuffled>(lanes, from).value;
  }
}

template <typename T>
void gather(T* (&operands)[kWarpSize], Thread* lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    operands[lane] = &operands_of<T>(lanes, lane);
  }
}

// What the lanes of `mask` wait for, once all of them are there.
void meet(Wait kind, Thread* lanes, unsigned mask) {
  switch (kind) {
    case Wait::kWarp:
      join_clocks(lanes, mask);
      break;
    case Wait::kBallot:
      do_ballot(lanes, mask);
      break;
    case Wait::kShuffle:
    case Wait::kShuffleUp:
    case Wait::kShuffleDown:
    case Wait::kShuffleXor:
      do_shuffle(kind, lanes, mask);
      break;
    case Wait::kLoadMatrices:
    case Wait::kLoadMatricesTransposed: {
      Matrices* operands[kWarpSize];
      gather(operands, lanes);
      load_matrices(kind == Wait::kLoadMatricesTransposed, operands);
      break;
    }
    default: {
      Product* operands[kWarpSize];
      gather(operands, lanes);
      multiply_add(kind, operands);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1u) {
      lanes[lane].wait = Wait::kNothing;
    }
  }
}

std::string state_of(const Thread& thread) {
  if (thread.wait == Wait::kExited) {
    return "has exited";
  }
  std::string text = std::string("waits at ") + name_of(thread.wait);
  if (thread.wait > Wait::kBlockCount) {
    char mask[32];
    snprintf(mask, sizeof(mask), " (mask 0x%08x)", thread.mask);
    text += mask;
  }
  return text;
}

[[noreturn]] void fail_apart(const Thread& thread, const Thread& other) {
  fail(&thread, thread.caller,
       state_of(thread) + ", but thread " + std::to_string(other.number) + " " + state_of(other),
       other.wait == Wait::kExited ? nullptr : other.caller);
}

// Lets those lanes go on whose partners are all there; says whether there were any.
bool release(Thread* lanes, int count) {
  bool released = false;
  for (int lane = 0; lane < count; ++lane) {
    const Thread& first = lanes[lane];
    if (first.wait <= Wait::kBlockCount) {
      continue;
    }
    bool complete = true;
    for (int l = 0; l < kWarpSize && complete; ++l) {
      complete = (first.mask >> l & 1u) == 0 ||
                 (l < count && lanes[l].wait == first.wait && lanes[l].mask == first.mask);
    }
    if (complete) {
      meet(first.wait, lanes, first.mask);
      released = true;
    }
  }
  return released;
}

// Runs the threads of a warp until each has exited or waits for the block.
void run_warp(Thread* lanes, int count) {
  do {
    for (int lane = 0; lane < count; ++lane) {
      if (lanes[lane].wait == Wait::kNothing) {
        resume(lanes[lane]);
      }
    }
  } while (release(lanes, count));
  for (int lane = 0; lane < count; ++lane) {
    const Thread& thread = lanes[lane];
    if (thread.wait <= Wait::kBlockCount) {
      continue;
    }
    for (int l = 0; l < kWarpSize; ++l) {
      if ((thread.mask >> l & 1u) != 0 && l >= count) {
        fail(&thread, thread.caller, state_of(thread) + ", but the block has no such lanes");
      }
      if ((thread.mask >> l & 1u) != 0 &&
          (lanes[l].wait != thread.wait || lanes[l].mask != thread.mask)) {
        fail_apart(thread, lanes[l]);
      }
    }
  }
}

void start_block() {
  engine.block_epoch = ++engine.epoch;
  for (int t = 0; t < engine.launch->threads; ++t) {
    Thread& thread = engine.threads[t];
    thread.stack_pointer = new_stack(engine.stacks + t * kStackBytes + kStackBytes, &enter_thread);
    thread.wait = Wait::kNothing;
    thread.groups = 0;
    thread.copies.clear();
    memset(thread.clock, 0, sizeof(thread.clock));
    thread.clock[thread.lane] = 1;
  }
}

void run_block() {
  start_block();
  Thread* const threads = engine.threads;
  const int count = engine.launch->threads;
  while (true) {
    for (int w = 0; w < warps(); ++w) {
      const int first = w * kWarpSize;
      run_warp(threads + first, count - first < kWarpSize ? count - first : kWarpSize);
    }
    int true_ones = 0;
    for (int t = 0; t < count; ++t) {
      if (threads[t].wait != threads[0].wait) {
        threads[t].wait == Wait::kExited ? fail_apart(threads[0], threads[t])
                                         : fail_apart(threads[t], threads[0]);
      }
      true_ones += threads[t].predicate != 0;
    }
    const Wait kind = threads[0].wait;
    if (kind == Wait::kExited) {
      return;
    }
    const int result = kind == Wait::kBlockAnd  ? true_ones == count
                       : kind == Wait::kBlockOr ? true_ones > 0
                                                : true_ones;
    ++engine.epoch;
    for (int t = 0; t < count; ++t) {
      threads[t].predicate = result;
      threads[t].wait = Wait::kNothing;
    }
  }
}

}  // namespace

void fail(const Thread* thread, const void* caller, std::string text, const void* other) {
  fault.found = true;
  fault.thread = thread != nullptr ? thread->number : -1;
  fault.text = std::move(text);
  fault.caller = caller;
  fault.other = other;
  if (engine.current == nullptr) {
    throw Stop();
  }
  void* gone;
  switch_stack(&gone, engine.scheduler);
  __builtin_unreachable();
}

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!pending.empty()) {
    throw std::runtime_error(std::exchange(pending, {}));
  }
  prepare();
  engine.launch = &launch;
  forget_accesses();
  engine.launch_epoch = ++engine.epoch;
  try {
    for (unsigned z = 0; z < launch.grid.z; ++z) {
      for (unsigned y = 0; y < launch.grid.y; ++y) {
        for (unsigned x = 0; x < launch.grid.x; ++x) {
          engine.block = {x, y, z};
          run_block();
        }
      }
    }
  } catch (const Stop&) {
    const std::string text = describe(fault);
    fault = {};
    throw std::runtime_error(text);
  }
}

Index thread_index() { return {static_cast<unsigned>(engine.current->number), 0, 0}; }
Index block_index() { return engine.block; }
Index block_size() { return {static_cast<unsigned>(engine.launch->threads), 1, 1}; }
Index grid_size() { return engine.launch->grid; }

unsigned char* shared_memory() { return engine.shared; }

int wait_for_block(Wait kind, int predicate) {
  engine.current->predicate = predicate;
  wait_for(kind, 0, nullptr, __builtin_return_address(0));
  return engine.current->predicate;
}

void wait_for_warp(unsigned mask) {
  wait_for(Wait::kWarp, mask, nullptr, __builtin_return_address(0));
}

unsigned ballot(unsigned mask, bool predicate) {
  Vote vote = {predicate, 0};
  wait_for(Wait::kBallot, mask, &vote, __builtin_return_address(0));
  return vote.result;
}

uint64_t shuffle(Wait kind, unsigned mask, uint64_t value, int argument, int width) {
  const void* const caller = __builtin_return_address(0);
  if (width < 1 || width > kWarpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail(engine.current, caller,
         std::string(name_of(kind)) + " with width " + std::to_string(width) +
             ", which is no power of two up to 32");
  }
  if (kind != Wait::kShuffle && (argument < 0 || argument >= kWarpSize)) {
    fail(engine.current, caller,
         std::string(name_of(kind)) + " with a distance of " + std::to_string(argument));
  }
  Shuffled operands = {value, argument, width, 0};
  wait_for(kind, mask, &operands, caller);
  return operands.result;
}

void copy_async(void* shared, const void* global, bool valid) {
  const void* const caller = __builtin_return_address(0);
  Thread& self = *engine.current;
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(&self, caller, "copy_async with an address that does not lie on 16 bytes");
  }
  if (!is_shared(shared) || is_shared(global)) {
    fail(&self, caller, "copy_async must go from global to shared memory");
  }
  Copy copy = {static_cast<unsigned char*>(shared), {}, self.groups};
  if (valid) {
    check_read(self, global, 16, caller);
    __builtin_memcpy(copy.bytes, global, 16);
  }
  check_copy(self, shared, caller);
  engine.busy = true;
  self.copies.push_back(copy);
  engine.busy = false;
}

void copy_async_commit() { ++engine.current->groups; }

void copy_async_wait(int pending) {
  Thread& self = *engine.current;
  size_t left = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group < self.groups - pending) {
      __builtin_memcpy(copy.to, copy.bytes, 16);
      finish_copy(self, copy.to);
    } else {
      self.copies[left++] = copy;
    }
  }
  self.copies.resize(left);
}

void load_matrices(Wait kind, uint32_t* r, const void* row) {
  const void* const caller = __builtin_return_address(0);
  Thread& self = *engine.current;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !is_shared(row)) {
    fail(&self, caller, "the row of load_matrices is not in shared memory on 16 bytes");
  }
  check_read(self, row, 16, caller);
  Matrices operands = {r, static_cast<const unsigned char*>(row)};
  wait_for(kind, 0xffffffffu, &operands, caller);
}

void multiply_add(Wait kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Product operands = {d, a, b0, b1};
  wait_for(kind, 0xffffffffu, &operands, __builtin_return_address(0));
}

}  // namespace mimkernels::emulation

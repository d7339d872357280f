// Every access of a kernel passes here. The kernels are compiled with -fsanitize=thread, which
// calls the __tsan_* functions below before each access that may leave a thread's registers; they
// are ours, no sanitizer's library is linked.
//
// Each byte of shared memory, and each byte of global memory that a launch touches, has a cell: who
// wrote it last, and who read it since. Two accesses of different threads, one of them a write, are
// in order if a block barrier lies between them, or if the second thread has met the first one in
// __syncwarp since (vector clocks, within the warp).
#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "emulation/engine.h"

extern "C" {
// There if AddressSanitizer's library is in the process; then torch's tensors have red zones.
__attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);
void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __real_memmove(void* to, const void* from, size_t bytes);
void* __real_memset(void* to, int value, size_t bytes);
}

namespace mimkernels::emulation {

namespace {

constexpr uint8_t kSeveralWarps = 0xff;
constexpr uint8_t kInFlight = 1;  // an asynchronous copy to it has not been waited for
constexpr uint8_t kReadByEarlierBlock = 2;

struct Cell {
  uint32_t write_epoch;
  uint32_t write_clock;  // the writer's own
  uint32_t write_place;  // where, from kPlaces on
  uint32_t read_epoch;
  uint32_t read_clock;  // the least of the readers' own
  uint32_t read_place;
  uint32_t readers;  // lanes of read_warp
  uint16_t writer;
  uint8_t read_warp;  // or kSeveralWarps
  uint8_t state;
};

constexpr size_t kPageBytes = 1024;

struct Page {
  Cell cells[kPageBytes];
};

constexpr size_t kMostPages = 4096;  // 128 MiB

Cell shared_cells[kMostSharedBytes];
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
// The pages used last, by the low bits of their number.
struct Recent {
  uintptr_t number;
  Page* page;
};
Recent recent[256];

// Code addresses fit 32 bits as offsets from a point in this library.
const char kOrigin = 0;
uint32_t place_of(const void* caller) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(caller) -
                               reinterpret_cast<uintptr_t>(&kOrigin));
}
const void* place_at(uint32_t place) { return &kOrigin + static_cast<int32_t>(place); }

Cell* cells_of(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  Recent& last = recent[number % 256];
  if (last.page == nullptr || last.number != number) {
    engine.busy = true;
    std::unique_ptr<Page>& page = pages[number];
    if (page == nullptr) {
      page = std::make_unique<Page>();
    }
    engine.busy = false;
    last = {number, page.get()};
  }
  return &last.page->cells[address % kPageBytes];
}

enum class Space { kShared, kGlobal };

std::string place_text(Space space, const void* address, size_t bytes) {
  char text[96];
  if (space == Space::kShared) {
    snprintf(text, sizeof(text), "%zu bytes at %td of shared memory", bytes,
             static_cast<const unsigned char*>(address) - engine.shared);
  } else {
    snprintf(text, sizeof(text), "%zu bytes at %p of global memory", bytes, address);
  }
  return text;
}

// One access under way, for the messages.
struct Access {
  Thread& thread;
  Space space;
  bool write;
  const void* address;
  size_t bytes;
  const void* caller;

  [[noreturn]] void fail(const std::string& why, const void* other = nullptr) const {
    emulation::fail(
        &thread, caller,
        std::string(write ? "writes " : "reads ") + place_text(space, address, bytes) + why, other);
  }
};

// Whether another block of this launch, of those that ran before, did that.
bool by_earlier_block(const Access& access, uint32_t epoch) {
  return access.space == Space::kGlobal && epoch >= engine.launch_epoch &&
         epoch < engine.block_epoch;
}

bool seen(const Thread& thread, int lane, uint32_t clock) { return thread.clock[lane] >= clock; }

// The last write must have happened before this access.
void check_last_write(const Access& access, const Cell& cell) {
  const Thread& thread = access.thread;
  if (cell.write_epoch == engine.epoch) {
    if (cell.writer != thread.number &&
        !(cell.writer / kWarpSize == thread.warp &&
          seen(thread, cell.writer % kWarpSize, cell.write_clock))) {
      access.fail(
          ", which thread " + std::to_string(cell.writer) + " wrote, with no barrier between them",
          place_at(cell.write_place));
    }
  } else if (by_earlier_block(access, cell.write_epoch)) {
    access.fail(", which another block of this launch wrote (its thread " +
                    std::to_string(cell.writer) + ")",
                place_at(cell.write_place));
  }
}

// So must all reads since, if this is a write.
void check_last_reads(const Access& access, const Cell& cell) {
  const Thread& thread = access.thread;
  if (cell.read_epoch == engine.epoch) {
    bool ordered = cell.read_warp == thread.warp;
    for (uint32_t left = ordered ? cell.readers & ~(1u << thread.lane) : 0; left != 0 && ordered;
         left &= left - 1) {
      ordered = seen(thread, __builtin_ctz(left), cell.read_clock);
    }
    if (!ordered) {
      access.fail(", which another thread read, with no barrier between them",
                  place_at(cell.read_place));
    }
  }
  const bool flagged = access.space == Space::kGlobal && cell.read_epoch >= engine.block_epoch &&
                       (cell.state & kReadByEarlierBlock) != 0;
  if (flagged || by_earlier_block(access, cell.read_epoch)) {
    access.fail(", which another block of this launch read", place_at(cell.read_place));
  }
}

void note_read(Cell& cell, const Thread& thread, uint32_t place) {
  const uint32_t own = thread.clock[thread.lane];
  const uint32_t bit = 1u << thread.lane;
  if (cell.read_epoch == engine.epoch) {
    if (cell.read_warp != thread.warp) {
      cell.read_warp = kSeveralWarps;
    } else if (cell.read_clock == own) {
      cell.readers |= bit;
    } else {
      bool all_seen = true;
      for (uint32_t left = cell.readers & ~bit; left != 0 && all_seen; left &= left - 1) {
        all_seen = seen(thread, __builtin_ctz(left), cell.read_clock);
      }
      cell.readers = all_seen ? bit : cell.readers | bit;
      cell.read_place = place;
      cell.read_clock = all_seen ? own : std::min(cell.read_clock, own);
    }
    return;
  }
  if (cell.read_epoch < engine.launch_epoch) {
    cell.state &= static_cast<uint8_t>(~kReadByEarlierBlock);
  } else if (cell.read_epoch < engine.block_epoch) {
    cell.state |= kReadByEarlierBlock;
  }
  cell.read_epoch = engine.epoch;
  cell.read_clock = own;
  cell.read_place = place;
  cell.readers = bit;
  cell.read_warp = static_cast<uint8_t>(thread.warp);
}

void note_write(Cell& cell, const Thread& thread, uint32_t place) {
  cell.write_epoch = engine.epoch;
  cell.write_clock = thread.clock[thread.lane];
  cell.write_place = place;
  cell.writer = static_cast<uint16_t>(thread.number);
  cell.state &= static_cast<uint8_t>(~kInFlight);
}

void check_cell(const Access& access, Cell& cell, uint32_t place) {
  if (access.space == Space::kShared) {
    const bool written = cell.write_epoch >= engine.block_epoch;
    if (written && (cell.state & kInFlight) != 0) {
      access.fail(", to which an asynchronous copy of thread " + std::to_string(cell.writer) +
                      " is under way",
                  place_at(cell.write_place));
    }
    if (!written && !access.write) {
      access.fail(", which no thread of the block has written so far (a missing barrier?)");
    }
  }
  check_last_write(access, cell);
  if (access.write) {
    check_last_reads(access, cell);
    note_write(cell, access.thread, place);
  } else {
    note_read(cell, access.thread, place);
  }
}

// The bytes of an access nearly always share one history: what the first became, the others become.
void check_cells(const Access& access, Cell* cells, size_t count, uint32_t place) {
  Cell before = {};
  Cell after = {};
  for (size_t i = 0; i < count; ++i) {
    if (i > 0 && __builtin_memcmp(&cells[i], &before, sizeof(Cell)) == 0) {
      cells[i] = after;
      continue;
    }
    before = cells[i];
    check_cell(access, cells[i], place);
    after = cells[i];
  }
}

void check_shared(const Access& access) {
  const int64_t offset = static_cast<const unsigned char*>(access.address) - engine.shared;
  if (offset < 0 || offset + static_cast<int64_t>(access.bytes) > engine.launch->shared_bytes) {
    access.fail(" of which the launch has " + std::to_string(engine.launch->shared_bytes) +
                " bytes");
  }
  check_cells(access, shared_cells + offset, access.bytes, place_of(access.caller));
}

void check_global(const Access& access) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(access.address);
  if (address < 65536) {
    access.fail(": a null pointer");
  }
  if (&__asan_region_is_poisoned != nullptr &&
      __asan_region_is_poisoned(const_cast<void*>(access.address), access.bytes) != nullptr) {
    access.fail(", which no allocation holds (or one that is freed)");
  }
  const uint32_t place = place_of(access.caller);
  for (size_t i = 0; i < access.bytes;) {
    Cell* const cells = cells_of(address + i);
    const size_t here = std::min(access.bytes - i, kPageBytes - (address + i) % kPageBytes);
    check_cells(access, cells, here, place);
    i += here;
  }
}

bool in_range(const void* address, const unsigned char* begin, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(begin) < bytes;
}

inline void check(Thread& thread, const void* address, size_t bytes, bool write,
                  const void* caller) {
  if (in_range(address, thread.stack, kStackBytes)) {
    return;
  }
  const Space space = is_shared(address) ? Space::kShared : Space::kGlobal;
  const Access access = {thread, space, write, address, bytes, caller};
  if (space == Space::kShared) {
    check_shared(access);
  } else if (in_range(address, engine.stacks, kMostThreads * kStackBytes)) {
    access.fail(": another thread's local memory");
  } else {
    check_global(access);
  }
}

}  // namespace

bool is_shared(const void* address) {
  return in_range(address, engine.shared - kGuardBytes, 2 * kGuardBytes);
}

void check_read(Thread& thread, const void* from, size_t bytes, const void* caller) {
  check(thread, from, bytes, false, caller);
}

void check_write(Thread& thread, void* to, size_t bytes, const void* caller) {
  check(thread, to, bytes, true, caller);
}

void check_copy(Thread& thread, void* to, const void* caller) {
  check(thread, to, 16, true, caller);
  Cell* const cells = shared_cells + (static_cast<unsigned char*>(to) - engine.shared);
  for (int i = 0; i < 16; ++i) {
    cells[i].state |= kInFlight;
  }
}

void finish_copy(Thread& thread, void* to) {
  Cell* const cells = shared_cells + (static_cast<unsigned char*>(to) - engine.shared);
  for (int i = 0; i < 16; ++i) {
    note_write(cells[i], thread, cells[i].write_place);
  }
}

void forget_accesses() {
  if (pages.size() > kMostPages) {
    pages.clear();
    std::fill(std::begin(recent), std::end(recent), Recent{});
  }
}

namespace {

inline void on_access(const void* address, size_t bytes, bool write, const void* caller) {
  Thread* const thread = engine.current;
  if (thread != nullptr && !engine.busy) {
    check(*thread, address, bytes, write, caller);
  }
}

}  // namespace

}  // namespace mimkernels::emulation

using mimkernels::emulation::on_access;

// What GCC calls. Of atomic accesses there is only the one that guards static variables of
// host functions: kernels have none.
#define MIMKERNELS_ON_ACCESS(name, bytes, write)                   \
  extern "C" void __tsan_##name(void* address) {                   \
    on_access(address, bytes, write, __builtin_return_address(0)); \
  }
#define MIMKERNELS_ON_ACCESSES(bytes)                       \
  MIMKERNELS_ON_ACCESS(read##bytes, bytes, false)           \
  MIMKERNELS_ON_ACCESS(write##bytes, bytes, true)           \
  MIMKERNELS_ON_ACCESS(unaligned_read##bytes, bytes, false) \
  MIMKERNELS_ON_ACCESS(unaligned_write##bytes, bytes, true) \
  MIMKERNELS_ON_ACCESS(volatile_read##bytes, bytes, false)  \
  MIMKERNELS_ON_ACCESS(volatile_write##bytes, bytes, true)
MIMKERNELS_ON_ACCESSES(1)
MIMKERNELS_ON_ACCESSES(2)
MIMKERNELS_ON_ACCESSES(4)
MIMKERNELS_ON_ACCESSES(8)
MIMKERNELS_ON_ACCESSES(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
void __tsan_read_range(void* address, size_t bytes) {
  on_access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  on_access(address, bytes, true, __builtin_return_address(0));
}

// memcpy and its like where they stay calls; the linker leads them here (--wrap).
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) {
    on_access(from, bytes, false, __builtin_return_address(0));
    on_access(to, bytes, true, __builtin_return_address(0));
  }
  return __real_memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  if (bytes > 0) {
    on_access(from, bytes, false, __builtin_return_address(0));
    on_access(to, bytes, true, __builtin_return_address(0));
  }
  return __real_memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  if (bytes > 0) {
    on_access(to, bytes, true, __builtin_return_address(0));
  }
  return __real_memset(to, value, bytes);
}
}

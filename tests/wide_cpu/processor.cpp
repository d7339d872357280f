// What tests/wide_cpu/processor.py needs beside Bochs: its pages, its traps, and three of our own
// matters that Bochs does not know or gets wrong.
//
// Compiled when it is first needed, linked to nothing: the addresses of Bochs's functions are put
// into the variables below.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Outcome {  // of csrc/emulation/amx/tiles.h
  int length;
  const char* fault;
};

constexpr int kRegisters = 16;  // rax rcx rdx rbx rsp rbp rsi rdi r8 ... r15
enum Register { kRax = 0, kRcx = 1, kRdx = 2, kRsp = 4, kRsi = 6, kRdi = 7, kR8 = 8, kR9, kR10 };
constexpr uint64_t kRegions = 1024;     // of 1 GiB
constexpr int kUnknownInstruction = 6;  // the exception
// VCVTNE2PS2BF16, whose upper half Bochs computes wrongly, and the opcode that it is given in its
// place, which no instruction has.
constexpr uint8_t kConvertTwo = 0x72;
constexpr uint8_t kUnused = 0x73;

}  // namespace

extern "C" {

void* cpu = nullptr;
void (*page_insert)(uint64_t, uint64_t) = nullptr;
void (*run)(void*, void**) = nullptr;
void (*stop)(void*) = nullptr;
uint64_t (*get_register[kRegisters])(void*) = {};
void (*set_register[kRegisters])(void*, uint64_t) = {};
uint64_t (*get_rip)(void*) = nullptr;
void (*set_rip)(void*, uint64_t) = nullptr;
void (*get_zmm)(void*, uint64_t, uint32_t*) = nullptr;
void (*set_zmm)(void*, uint64_t, const uint32_t*) = nullptr;
Outcome (*execute_tile)(const uint8_t*, const uint64_t (&)[kRegisters]) = nullptr;

uint64_t region_of[kRegions] = {};  // GiB of the guest -> 1 + GiB of this process
uint64_t traps_at = 0;              // where a call returns to; 64 bytes on, where system calls go
int64_t most_ranges = 3;            // that a loop over tasks is cut into
int count_instructions = 0;
uint8_t* pool = nullptr;
uint64_t pool_used = 0;
void* given_back[64] = {};   // by size; each holds the next
uint64_t* visits = nullptr;  // of the instruction at each address from visits_from on
uint64_t visits_from = 0, visits_size = 0;
uint64_t instructions = 0, tile_instructions = 0, conversions = 0, system_calls = 0;

// What kernels allocate with. Not the heap: while the guest is in the middle of changing that, Bochs
// may need memory itself. A class of sizes per power of two; nothing is given back.
void* take(uint64_t, uint64_t size) {
  constexpr uint64_t kPool = 4ull << 30;
  constexpr uint64_t kHeader = 64;
  if (pool == nullptr) {
    void* const made = mmap(nullptr, kPool, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) return nullptr;
    pool = static_cast<uint8_t*>(made);
  }
  uint64_t kind = 6;
  while ((1ull << kind) < size) ++kind;
  if (void* const again = given_back[kind]) {
    memcpy(&given_back[kind], again, sizeof(void*));
    return again;
  }
  const uint64_t bytes = kHeader + (1ull << kind);
  if (pool_used + bytes > kPool) return nullptr;
  uint8_t* const header = pool + pool_used;
  pool_used += bytes;
  memcpy(header, &kind, sizeof(kind));
  return header + kHeader;
}

void give_back(void* memory) {
  uint8_t* const at = static_cast<uint8_t*>(memory);
  if (pool == nullptr || at < pool || at >= pool + pool_used) return free(memory);
  uint64_t kind;
  memcpy(&kind, at - 64, sizeof(kind));
  memcpy(memory, &given_back[kind], sizeof(void*));
  given_back[kind] = memory;
}

// Bochs asks for a page that it meets for the first time.
void on_missing_page(uint64_t address) {
  const uint64_t region = address >> 30;
  if (region >= kRegions || region_of[region] == 0) {
    fprintf(stderr, "wide_cpu: no page at %llx\n", static_cast<unsigned long long>(address));
    abort();
  }
  page_insert(address & ~0xfffull, (region_of[region] - 1) << 30 | (address & 0x3ffff000ull));
}

}  // extern "C"

namespace {

bool returned = false;
int exception = -1;

uint64_t reg(int number) { return get_register[number](cpu); }

// Both traps are a clflush of themselves, which nothing else here executes.
void on_clflush(void*, uint32_t, uint64_t address, uint64_t) {
  if (address < traps_at || address >= traps_at + 4096) return;
  if (address < traps_at + 64) {
    returned = true;
    stop(cpu);
    return;
  }
  ++system_calls;
  const long number = static_cast<long>(reg(kRax));
  const bool asks_for_tiles = number == SYS_arch_prctl;
  const long result = asks_for_tiles ? 0
                                     : syscall(number, reg(kRdi), reg(kRsi), reg(kRdx), reg(kR10),
                                               reg(kR8), reg(kR9));
  set_register[kRax](cpu, static_cast<uint64_t>(result));
}

void on_exception(void*, uint32_t, uint32_t vector, uint32_t) {
  exception = static_cast<int>(vector);
  stop(cpu);
}

void on_instruction(void*, uint32_t, void*) {
  ++instructions;
  if (visits == nullptr) return;
  const uint64_t at = get_rip(cpu) - visits_from;
  if (at < visits_size) ++visits[at];
}

uint32_t rounded(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) return bits >> 16 & 0x8000u;
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// EVEX.F2.0F38.W0, 256 or 512 bits, unmasked; `end` is where the next instruction begins.
bool convert_two(const uint8_t* code, const uint8_t* end) {
  const bool is_it = code[0] == 0x62 && (code[1] & 0x0f) == 2 && (code[2] & 0x87) == 0x07 &&
                     (code[3] & 0x17) == 0 && code[4] == kUnused;
  const int bytes = (code[3] >> 5 & 3) == 2 ? 64 : (code[3] >> 5 & 3) == 1 ? 32 : 0;
  if (!is_it || bytes == 0) return false;
  const auto bit = [&](int byte, int at, int worth) { return code[byte] >> at & 1 ? 0 : worth; };
  const int to = (code[5] >> 3 & 7) + bit(1, 7, 8) + bit(1, 4, 16);
  const int high = (~code[2] >> 3 & 15) + bit(3, 3, 16);
  uint32_t low_words[16] = {};
  uint32_t high_words[16];
  get_zmm(cpu, static_cast<uint64_t>(high), high_words);
  const int mode = code[5] >> 6;
  const uint8_t* at = code + 6;
  if (mode == 3) {
    get_zmm(cpu, static_cast<uint64_t>((code[5] & 7) + bit(1, 5, 8) + bit(1, 6, 16)), low_words);
  } else {
    uint64_t address = 0;
    bool wide = mode == 2;
    if ((code[5] & 7) == 4) {
      const uint8_t byte = *at++;
      const int index = (byte >> 3 & 7) + bit(1, 6, 8);
      if (index != 4) address = reg(index) << (byte >> 6);
      if ((byte & 7) == 5 && mode == 0) {
        wide = true;
      } else {
        address += reg((byte & 7) + bit(1, 5, 8));
      }
    } else if ((code[5] & 7) == 5 && mode == 0) {
      wide = true;
      address = reinterpret_cast<uint64_t>(end);
    } else {
      address = reg((code[5] & 7) + bit(1, 5, 8));
    }
    int32_t displacement = 0;
    if (wide) {
      memcpy(&displacement, at, 4);
      at += 4;
    } else if (mode == 1) {
      displacement = static_cast<int8_t>(*at++) * bytes;
    }
    memcpy(low_words, reinterpret_cast<const void*>(address + static_cast<int64_t>(displacement)),
           static_cast<size_t>(bytes));
  }
  if (at != end) return false;
  uint16_t halves[32] = {};
  const int count = bytes / 4;
  for (int i = 0; i < count; ++i) {
    halves[i] = static_cast<uint16_t>(rounded(low_words[i]));
    halves[count + i] = static_cast<uint16_t>(rounded(high_words[i]));
  }
  uint32_t words[16];
  memcpy(words, halves, sizeof(words));
  set_zmm(cpu, static_cast<uint64_t>(to), words);
  ++conversions;
  return true;
}

// Executes the instruction before `end`, if it is one of ours: Bochs has read past it.
bool execute_before(const uint8_t* end) {
  uint64_t registers[kRegisters];
  for (int i = 0; i < kRegisters; ++i) registers[i] = reg(i);
  for (int length = 5; length <= 12; ++length) {
    const uint8_t* code = end - length;
    if (length > 5 && convert_two(code, end)) return true;
    const bool is_tile = code[0] == 0xc4 && (code[1] & 0x1f) == 2 &&
                         (code[3] == 0x49 || code[3] == 0x4b || code[3] == 0x5c);
    if (!is_tile) continue;
    const Outcome outcome = execute_tile(code, registers);
    if (outcome.fault != nullptr) fprintf(stderr, "wide_cpu: %s\n", outcome.fault);
    if (outcome.length != length) continue;
    ++tile_instructions;
    return true;
  }
  return false;
}

}  // namespace

extern "C" {

// function(first, second, third) on the emulated CPU; nonzero where it did not return.
int call(uint64_t function, uint64_t first, uint64_t second, uint64_t third, uint64_t stack) {
  // As in Bochs's bindings: a context, then a pointer per kind of event.
  static void* hooks[64] = {};
  constexpr int kException = 10;
  constexpr int kClflush = 15;
  constexpr int kBeforeExecution = 16;
  hooks[kException] = reinterpret_cast<void*>(&on_exception);
  hooks[kClflush] = reinterpret_cast<void*>(&on_clflush);
  hooks[kBeforeExecution] =
      count_instructions != 0 ? reinterpret_cast<void*>(&on_instruction) : nullptr;
  void* list[2] = {hooks, nullptr};
  set_register[kRdi](cpu, first);
  set_register[kRsi](cpu, second);
  set_register[kRdx](cpu, third);
  memcpy(reinterpret_cast<void*>(stack), &traps_at, sizeof(traps_at));
  set_register[kRsp](cpu, stack);
  set_rip(cpu, function);
  returned = false;
  while (true) {
    exception = -1;
    run(cpu, list);
    if (returned) return 0;
    const uint64_t rip = get_rip(cpu);
    if (exception == kUnknownInstruction && execute_before(reinterpret_cast<const uint8_t*>(rip))) {
      continue;
    }
    fprintf(stderr, "wide_cpu: exception %d at %llx, after", exception,
            static_cast<unsigned long long>(rip));
    for (uint64_t at = rip - 16; at < rip; ++at) {
      fprintf(stderr, " %02x", *reinterpret_cast<const uint8_t*>(at));
    }
    fprintf(stderr, "\n");
    return 1;
  }
}

// A ParallelFor of csrc/core/parallel.h: in this thread, the last range first.
void last_first(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*),
                void* context) {
  if (begin >= end) return;
  int64_t ranges = (end - begin) / (grain < 1 ? 1 : grain);
  ranges = ranges < 1 ? 1 : ranges > most_ranges ? most_ranges : ranges;
  for (int64_t i = ranges - 1; i >= 0; --i) {
    fn(begin + (end - begin) * i / ranges, begin + (end - begin) * (i + 1) / ranges, context);
  }
}

}  // extern "C"

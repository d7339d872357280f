// Decodes and executes tile instructions, and catches the signal that they raise.
#include "emulation/amx/tiles.h"

#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mimkernels::emulation::amx {

namespace {

constexpr int kTiles = 8;
constexpr int kRows = 16;
constexpr int kBytes = 64;  // of a row

struct Tile {
  int rows = 0;
  int bytes = 0;
  alignas(64) uint8_t data[kRows][kBytes] = {};
};

struct Tiles {
  bool configured = false;
  Tile tiles[kTiles];
};

thread_local Tiles tiles_of_thread;

// Of the whole process.
int64_t threads_configured = 0;
enum Kind { kConfigure, kRelease, kZero, kLoad, kStore, kProduct, kKinds };
constexpr const char* kKindNames[kKinds] = {"ldtilecfg", "tilerelease", "tilezero",
                                            "tileloadd", "tilestored",  "tdpbf16ps"};
int64_t counts[kKinds] = {};

void count(int64_t* number, int64_t by = 1) { __atomic_fetch_add(number, by, __ATOMIC_RELAXED); }

// ---- decoding ----

// VEX.128.pp.0F38.W0, the one form that tile instructions have.
struct Instruction {
  uint8_t opcode = 0;
  uint8_t prefix = 0;  // 0: none, 1: 66, 2: F3, 3: F2
  int reg = 0;
  int rm = 0;
  int third = 0;  // VEX.vvvv
  bool memory = false;
  bool has_index_byte = false;
  const uint8_t* address = nullptr;  // without the index
  int64_t stride = 0;                // the scaled index
  int length = 0;
};

bool decode(const uint8_t* code, const uint64_t (&registers)[16], Instruction* out) {
  if (code[0] != 0xc4) return false;
  const bool extend_reg = (code[1] & 0x80) == 0;
  const bool extend_index = (code[1] & 0x40) == 0;
  const bool extend_base = (code[1] & 0x20) == 0;
  if ((code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
  Instruction in;
  in.third = ~code[2] >> 3 & 15;
  in.prefix = code[2] & 3;
  in.opcode = code[3];
  if (in.opcode != 0x49 && in.opcode != 0x4b && in.opcode != 0x5c) return false;
  const int mode = code[4] >> 6;
  in.reg = (code[4] >> 3 & 7) + 8 * extend_reg;
  in.rm = (code[4] & 7) + 8 * extend_base;
  in.length = 5;
  in.memory = mode != 3;
  if (in.memory) {
    uint64_t base = 0;
    bool wide = mode == 2;
    if ((code[4] & 7) == 4) {
      const uint8_t byte = code[in.length++];
      in.has_index_byte = true;
      const int index = (byte >> 3 & 7) + 8 * extend_index;
      if (index != 4) in.stride = static_cast<int64_t>(registers[index] << (byte >> 6));
      if ((byte & 7) == 5 && mode == 0) {
        wide = true;
      } else {
        base = registers[(byte & 7) + 8 * extend_base];
      }
    } else if ((code[4] & 7) == 5 && mode == 0) {
      wide = true;
      base = reinterpret_cast<uint64_t>(code) + 9;  // the next instruction
    } else {
      base = registers[in.rm];
    }
    int32_t displacement = 0;
    if (wide) {
      memcpy(&displacement, code + in.length, 4);
      in.length += 4;
    } else if (mode == 1) {
      displacement = static_cast<int8_t>(code[in.length++]);
    }
    in.address = reinterpret_cast<const uint8_t*>(base + static_cast<int64_t>(displacement));
  }
  *out = in;
  return true;
}

// ---- executing ----

const char* configure(const uint8_t* shapes) {
  Tiles& all = tiles_of_thread;
  if (all.configured) return "ldtilecfg: this thread's tiles are set up already";
  uint8_t raw[64];
  memcpy(raw, shapes, sizeof(raw));
  if (raw[0] != 1) return "ldtilecfg: the palette is not 1";
  if (raw[1] != 0) return "ldtilecfg: a start row is not emulated";
  for (int i = 2; i < 16; ++i) {
    if (raw[i] != 0) return "ldtilecfg: reserved bytes are not 0";
  }
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes = 0;
    memcpy(&bytes, raw + 16 + 2 * i, 2);
    const int rows = raw[48 + i];
    if (i >= kTiles) {
      if (bytes != 0 || rows != 0) return "ldtilecfg: there are 8 tiles";
      continue;
    }
    if (bytes > kBytes) return "ldtilecfg: a row has at most 64 bytes";
    if (rows > kRows) return "ldtilecfg: a tile has at most 16 rows";
    if ((bytes == 0) != (rows == 0)) return "ldtilecfg: rows without bytes, or bytes without rows";
  }
  for (int i = 0; i < kTiles; ++i) {
    Tile& t = all.tiles[i];
    uint16_t bytes = 0;
    memcpy(&bytes, raw + 16 + 2 * i, 2);
    t.bytes = bytes;
    t.rows = raw[48 + i];
    memset(t.data, 0, sizeof(t.data));
  }
  all.configured = true;
  count(&threads_configured);
  return nullptr;
}

const char* release() {
  Tiles& all = tiles_of_thread;
  if (!all.configured) return "tilerelease: this thread's tiles are not in use";
  all = Tiles{};
  count(&threads_configured, -1);
  return nullptr;
}

const char* check(int number) {
  if (!tiles_of_thread.configured) return "the tiles of this thread are not set up";
  if (number >= kTiles) return "there are 8 tiles";
  if (tiles_of_thread.tiles[number].rows == 0) return "a tile without a shape";
  return nullptr;
}

void load(Tile& t, const uint8_t* from, int64_t stride) {
  uint8_t data[kRows][kBytes] = {};
  for (int r = 0; r < t.rows; ++r) {
    memcpy(data[r], from + r * stride, static_cast<size_t>(t.bytes));
  }
  memcpy(t.data, data, sizeof(data));
}

void store(const Tile& t, uint8_t* to, int64_t stride) {
  for (int r = 0; r < t.rows; ++r) {
    memcpy(to + r * stride, t.data[r], static_cast<size_t>(t.bytes));
  }
}

// 8 pairs of bf16, of which this is one half each, as fp32.
__m256 first_halves(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
__m256 second_halves(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}

// Where subnormal numbers are 0, as MXCSR has it meanwhile. Columns past the last are 0 in b.
__attribute__((noinline)) void multiply_rows(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < c.rows; ++m) {
    for (int half = 0; half < kBytes; half += 32) {
      __m256 even = _mm256_setzero_ps();
      __m256 odd = _mm256_setzero_ps();
      for (int k = 0; k < a.bytes / 4; ++k) {
        int32_t pair = 0;
        memcpy(&pair, a.data[m] + 4 * k, 4);
        const __m256i left = _mm256_set1_epi32(pair);
        const __m256i right =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b.data[k] + half));
        even = _mm256_fmadd_ps(first_halves(left), first_halves(right), even);
        odd = _mm256_fmadd_ps(second_halves(left), second_halves(right), odd);
      }
      float* const to = reinterpret_cast<float*>(c.data[m] + half);
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_add_ps(even, odd)));
    }
    memset(c.data[m] + c.bytes, 0, static_cast<size_t>(kBytes - c.bytes));
  }
}

const char* multiply(int to, int left, int right) {
  if (to == left || to == right || left == right) return "tdpbf16ps: a tile is named twice";
  const int numbers[] = {to, left, right};
  for (const int number : numbers) {
    if (const char* fault = check(number)) return fault;
  }
  Tile& c = tiles_of_thread.tiles[to];
  const Tile& a = tiles_of_thread.tiles[left];
  const Tile& b = tiles_of_thread.tiles[right];
  if (c.bytes % 4 != 0 || a.bytes % 4 != 0 || b.bytes % 4 != 0) {
    return "tdpbf16ps: rows are no multiples of 4 bytes";
  }
  if (c.rows != a.rows) return "tdpbf16ps: C and A differ in rows";
  if (c.bytes != b.bytes) return "tdpbf16ps: C and B differ in columns";
  if (a.bytes / 4 != b.rows) return "tdpbf16ps: A has not as many pairs of columns as B has rows";
  constexpr unsigned kNothingTraps = 0x1f80;
  constexpr unsigned kSubnormalsAreZero = 0x8040;  // operands and results alike
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNothingTraps | kSubnormalsAreZero);
  multiply_rows(c, a, b);
  _mm_setcsr(before);
  return nullptr;
}

const char* perform(const Instruction& in, Kind* kind) {
  constexpr int kNone = 0;
  constexpr int kF3 = 2;
  constexpr int kF2 = 3;
  if (in.opcode == 0x5c) {
    *kind = kProduct;
    if (in.prefix != kF3 || in.memory) return "a product that is not emulated";
    return multiply(in.reg, in.rm, in.third);
  }
  if (in.third != 0) return "VEX.vvvv is not 1111b";
  if (in.opcode == 0x4b) {
    *kind = in.prefix == kF3 ? kStore : kLoad;
    if (!in.memory || in.prefix == kNone) return "no tile instruction";
    if (!in.has_index_byte) return "a tile in memory without base and stride";
    if (const char* fault = check(in.reg)) return fault;
    Tile& t = tiles_of_thread.tiles[in.reg];
    if (in.prefix == kF3) {
      store(t, const_cast<uint8_t*>(in.address), in.stride);
    } else {
      load(t, in.address, in.stride);
    }
    return nullptr;
  }
  if (in.memory) {
    *kind = kConfigure;
    if (in.prefix != kNone || in.reg != 0) return "sttilecfg is not emulated";
    return configure(in.address + in.stride);
  }
  if (in.prefix == kF2 && in.rm == 0) {
    *kind = kZero;
    if (const char* fault = check(in.reg)) return fault;
    memset(tiles_of_thread.tiles[in.reg].data, 0, sizeof(Tile::data));
    return nullptr;
  }
  *kind = kRelease;
  if (in.prefix != kNone || in.reg != 0 || in.rm != 0) {
    return "no tile instruction";
  }
  return release();
}

// ---- the signal ----

struct sigaction previous;

void say(const char* words) {
  const char* const parts[] = {"mimkernels: a tile instruction fails: ", words, "\n"};
  for (const char* part : parts) {
    if (write(STDERR_FILENO, part, strlen(part)) < 0) return;
  }
}

void on_unknown_instruction(int, siginfo_t*, void* context) {
  auto& state = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};
  uint64_t registers[16];
  for (int i = 0; i < 16; ++i) registers[i] = static_cast<uint64_t>(state[kOrder[i]]);
  const Outcome outcome = execute(reinterpret_cast<const uint8_t*>(state[REG_RIP]), registers);
  if (outcome.length > 0) {
    state[REG_RIP] += outcome.length;
    return;
  }
  // The instruction is met again, with nobody to catch it but those who were here before.
  if (outcome.fault != nullptr) {
    say(outcome.fault);
    signal(SIGILL, SIG_DFL);
  } else {
    sigaction(SIGILL, &previous, nullptr);
  }
}

void at_exit() {
  const char* const wanted = std::getenv("MIMKERNELS_AMX_COUNTS");
  if (wanted != nullptr && strcmp(wanted, "1") == 0) {
    for (int i = 0; i < kKinds; ++i) {
      fprintf(stderr, "%s %lld\n", kKindNames[i], static_cast<long long>(counts[i]));
    }
  }
  if (threads_configured == 0) return;
  fprintf(stderr, "mimkernels: %lld threads have left their tiles set up\n",
          static_cast<long long>(threads_configured));
  fflush(stderr);
  _exit(1);
}

}  // namespace

Outcome execute(const uint8_t* code, const uint64_t (&registers)[16]) {
  Instruction in;
  if (!decode(code, registers, &in)) return {};
  Kind kind = kKinds;
  const char* const fault = perform(in, &kind);
  if (fault != nullptr) return {0, fault};
  count(&counts[kind]);
  return {in.length, nullptr};
}

const uint8_t* tile(int number) { return tiles_of_thread.tiles[number].data[0]; }

bool start() {
  static const bool started = [] {
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    __builtin_cpu_init();
    if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16")) {
      return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }
    struct sigaction action = {};
    action.sa_sigaction = &on_unknown_instruction;
    action.sa_flags = SA_SIGINFO;
    if (sigaction(SIGILL, &action, &previous) != 0) return false;
    return std::atexit(&at_exit) == 0;
  }();
  return started;
}

}  // namespace mimkernels::emulation::amx

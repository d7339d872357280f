// Single tile instructions, by csrc/emulation/amx alone: the tests say what each does.
#include "emulation/amx/tiles.h"
#include "exported.h"

namespace amx = mimkernels::emulation::amx;

// The length of the instruction executed, 0 if it was none of AMX's, -1 after a fault.
EXPORTED int amx_execute(const uint8_t* code, const uint64_t* registers, const char** fault) {
  uint64_t copies[16];
  for (int i = 0; i < 16; ++i) copies[i] = registers[i];
  const amx::Outcome outcome = amx::execute(code, copies);
  *fault = outcome.fault;
  return outcome.fault != nullptr ? -1 : outcome.length;
}

EXPORTED const uint8_t* amx_tile(int number) { return amx::tile(number); }

EXPORTED bool amx_start() { return amx::start(); }

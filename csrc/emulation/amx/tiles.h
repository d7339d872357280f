// The tile instructions of AMX on a CPU that has none, for tests: what Intel's manual says they do,
// and what it forbids.
#pragma once

#include <cstdint>

namespace mimkernels::emulation::amx {

struct Outcome {
  int length = 0;               // bytes of the instruction, 0 where none was executed
  const char* fault = nullptr;  // why not, if it is one of AMX's
};

// Executes one instruction on the tiles of this thread: ldtilecfg, tilerelease, tilezero, tileloadd,
// tileloaddt1, tilestored or tdpbf16ps. Registers are numbered as instructions do.
//
// Stricter than the manual: tiles are not set up twice, nor released when they are not in use.
Outcome execute(const uint8_t* code, const uint64_t (&registers)[16]);

// The 16 rows of 64 bytes of a tile of this thread.
const uint8_t* tile(int number);

// Lets tile instructions run in this process: as they are where the CPU has AMX, else by execute,
// which the signal of an unknown instruction calls. What execute refuses ends the process with a
// message. Once it ends, so do tiles that a thread has left set up; with MIMKERNELS_AMX_COUNTS=1
// the numbers of instructions are printed then. False where the system refuses.
bool start();

}  // namespace mimkernels::emulation::amx

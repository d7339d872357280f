// The message of a fault: kernel, block, thread, what happened, and the lines of source.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <memory>
#include <sstream>

#include "emulation/engine.h"

namespace mimkernels::emulation {

namespace {

// From the folder of sources on, where a path has one.
std::string shortened(const std::string& place) {
  for (const char* folder : {"/csrc/", "/tests/"}) {
    const size_t at = place.rfind(folder);
    if (at != std::string::npos) {
      return place.substr(at + 1);
    }
  }
  return place;
}

struct Frame {
  std::string function;
  std::string place;  // file:line
};

// The inlined functions at an address, innermost first, as binutils' addr2line knows them; without
// it a single frame with the offset in the library.
std::vector<Frame> frames_at(const void* address) {
  Dl_info info;
  if (address == nullptr || dladdr(address, &info) == 0) {
    return {};
  }
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase);
  std::ostringstream command;
  command << "env -u LD_PRELOAD addr2line -C -f -i -e '" << info.dli_fname << "' " << std::hex
          << "0x" << offset << " 2>/dev/null";
  std::vector<Frame> frames;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.str().c_str(), "r"), &pclose);
  std::array<char, 4096> line;
  std::string function;
  while (pipe != nullptr && fgets(line.data(), line.size(), pipe.get()) != nullptr) {
    std::string text = line.data();
    text.erase(text.find_last_not_of('\n') + 1);
    if (function.empty()) {
      function = text;
    } else {
      frames.push_back({function, shortened(text.substr(0, text.find(" (")))});
      function.clear();
    }
  }
  if (frames.empty()) {
    std::ostringstream place;
    place << info.dli_fname << "+0x" << std::hex << offset;
    frames.push_back({"?", place.str()});
  }
  return frames;
}

void add_place(std::string& text, const char* title, const void* caller) {
  // The address is where the call returns to; the call itself is before it.
  const auto frames = frames_at(caller == nullptr ? nullptr : static_cast<const char*>(caller) - 1);
  for (const Frame& frame : frames) {
    const bool ours = frame.place.starts_with("csrc/emulation/");
    if (!ours || frames.size() == 1) {
      text += std::string("\n  ") + title + frame.place + " in " + frame.function;
      title = "  inlined into ";
    }
  }
}

}  // namespace

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kNothing:
      return "nothing";
    case Wait::kExited:
      return "the end";
    case Wait::kBlock:
      return "__syncthreads";
    case Wait::kBlockAnd:
      return "__syncthreads_and";
    case Wait::kBlockOr:
      return "__syncthreads_or";
    case Wait::kBlockCount:
      return "__syncthreads_count";
    case Wait::kWarp:
      return "__syncwarp";
    case Wait::kBallot:
      return "a vote";
    case Wait::kShuffle:
      return "__shfl_sync";
    case Wait::kShuffleUp:
      return "__shfl_up_sync";
    case Wait::kShuffleDown:
      return "__shfl_down_sync";
    case Wait::kShuffleXor:
      return "__shfl_xor_sync";
    case Wait::kLoadMatrices:
      return "load_matrices";
    case Wait::kLoadMatricesTransposed:
      return "load_matrices_transposed";
    case Wait::kMultiplyAddHalf:
      return "multiply_add<__half>";
    case Wait::kMultiplyAddBFloat16:
      return "multiply_add<__nv_bfloat16>";
    case Wait::kMultiplyAddTf32:
      return "multiply_add_tf32";
  }
  return "?";
}

std::string describe(const Fault& fault) {
  std::string text = "host code";
  if (fault.thread >= 0) {
    const auto kernel = frames_at(engine.launch->kernel);
    const Index& block = engine.block;
    text = "kernel " + (kernel.empty() ? "?" : kernel.back().function) + ", block (" +
           std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
           std::to_string(block.z) + "), thread " + std::to_string(fault.thread);
  }
  text += ": " + fault.text;
  add_place(text, "at ", fault.caller);
  add_place(text, "the other at ", fault.other);
  return text;
}

}  // namespace mimkernels::emulation

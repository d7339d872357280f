// Undefined behaviour that the compiler's checks find (-fsanitize=alignment,bounds,...): the
// functions that they call are ours, no sanitizer's library is linked.
#include "emulation/engine.h"

namespace mimkernels::emulation {

namespace {

// The beginning of what the compiler passes.
struct Site {
  const char* file;
  uint32_t line;
  uint32_t column;
};

void on_undefined(const void* site, const char* what, const void* caller) {
  const Site& at = *static_cast<const Site*>(site);
  const std::string text = std::string(what) + " (" + (at.file != nullptr ? at.file : "?") + ":" +
                           std::to_string(at.line) + ")";
  if (engine.current != nullptr) {
    fail(engine.current, caller, text);
  }
  if (pending.empty()) {
    pending = describe({true, -1, text, caller, nullptr});
  }
}

// The same for an access through a pointer.
struct Mismatch {
  Site site;
  const void* type;
  unsigned char log2_alignment;
  unsigned char kind;
};

std::string mismatch_text(const void* data, uintptr_t address) {
  const Mismatch& mismatch = *static_cast<const Mismatch*>(data);
  const uintptr_t alignment = uintptr_t{1} << mismatch.log2_alignment;
  char text[128];
  if (address == 0) {
    return "access through a null pointer";
  }
  if (address % alignment != 0) {
    snprintf(text, sizeof(text), "misaligned access at %p, which does not lie on %zu bytes",
             reinterpret_cast<void*>(address), static_cast<size_t>(alignment));
    return text;
  }
  return "access past the end of an object";
}

}  // namespace

}  // namespace mimkernels::emulation

using mimkernels::emulation::mismatch_text;
using mimkernels::emulation::on_undefined;

#define MIMKERNELS_ON_UNDEFINED(name, what, ...)                                 \
  extern "C" void __ubsan_handle_##name(void* data __VA_OPT__(, ) __VA_ARGS__) { \
    on_undefined(data, what, __builtin_return_address(0));                       \
  }
MIMKERNELS_ON_UNDEFINED(add_overflow, "signed overflow", uintptr_t, uintptr_t)
MIMKERNELS_ON_UNDEFINED(sub_overflow, "signed overflow", uintptr_t, uintptr_t)
MIMKERNELS_ON_UNDEFINED(mul_overflow, "signed overflow", uintptr_t, uintptr_t)
MIMKERNELS_ON_UNDEFINED(negate_overflow, "signed overflow", uintptr_t)
MIMKERNELS_ON_UNDEFINED(divrem_overflow, "division by zero or its overflow", uintptr_t, uintptr_t)
MIMKERNELS_ON_UNDEFINED(shift_out_of_bounds, "shift by too much or of a negative number", uintptr_t,
                        uintptr_t)
MIMKERNELS_ON_UNDEFINED(out_of_bounds, "index past the end of an array", uintptr_t)
MIMKERNELS_ON_UNDEFINED(load_invalid_value, "bool or enum with no value of its type", uintptr_t)
MIMKERNELS_ON_UNDEFINED(type_mismatch_v1, mismatch_text(data, address).c_str(), uintptr_t address)
MIMKERNELS_ON_UNDEFINED(missing_return, "a function ends without its value")
MIMKERNELS_ON_UNDEFINED(builtin_unreachable, "code that cannot be reached was")

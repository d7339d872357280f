// Chooses the instruction set at run time. The only file here that is compiled once, for the
// baseline CPU.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops/attention/params.h"

#if defined(MIMKERNELS_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(MIMKERNELS_HAVE_AMX_EMULATION)
#include "emulation/amx/tiles.h"
#endif

namespace mimkernels {

namespace portable {
extern const CpuKernels kernel_table;
}
#if defined(MIMKERNELS_HAVE_X86_ISAS)
namespace avx2 {
extern const CpuKernels kernel_table;
}
namespace avx512 {
extern const CpuKernels kernel_table;
}
#define MIMKERNELS_ATTENTION_OF(isa)                                                \
  namespace isa {                                                                   \
  Status attention_fwd(const AttentionFwdParams& params, ParallelFor parallel_for); \
  Status attention_bwd(const AttentionBwdParams& params, ParallelFor parallel_for); \
  }
MIMKERNELS_ATTENTION_OF(avx2)
MIMKERNELS_ATTENTION_OF(avx512)
// The builds that multiply bf16 in pairs or in tiles have attention of bf16, and nothing else.
MIMKERNELS_ATTENTION_OF(avx512_bf16)
#endif
#if defined(MIMKERNELS_HAVE_AMX)
MIMKERNELS_ATTENTION_OF(amx_bf16)
#endif
#if defined(MIMKERNELS_HAVE_AVX2_BF16)
MIMKERNELS_ATTENTION_OF(avx2_bf16)
MIMKERNELS_ATTENTION_OF(avx2_amx)
#endif
#if defined(MIMKERNELS_HAVE_AMX_EMULATION)
MIMKERNELS_ATTENTION_OF(amx_emulated)
#endif

namespace {

struct Choice {
  const CpuKernels* kernels;
  bool runs_here;
  bool (*start)() = nullptr;  // what it needs once it is chosen; false if it cannot have it
};

constexpr int kChoices = 8;

#if defined(MIMKERNELS_HAVE_X86_ISAS)
// One launcher for bf16 and one for everything else.
template <auto kOfBf16, auto kOfOthers, typename Params>
Status by_dtype(const Params& params, ParallelFor parallel_for) {
  const bool is_bf16 = params.scores.dtype == DType::kBFloat16;
  return (is_bf16 ? kOfBf16 : kOfOthers)(params, parallel_for);
}

// The kernels of another instruction set, but for attention of bf16.
#define MIMKERNELS_WITH_BF16_PRODUCTS(isa_, beneath)                                  \
  [] {                                                                                \
    CpuKernels table = beneath::kernel_table;                                         \
    table.isa = #isa_;                                                                \
    table.attention_fwd =                                                             \
        &by_dtype<&isa_::attention_fwd, &beneath::attention_fwd, AttentionFwdParams>; \
    table.attention_bwd =                                                             \
        &by_dtype<&isa_::attention_bwd, &beneath::attention_bwd, AttentionBwdParams>; \
    return table;                                                                     \
  }()
#endif

#if defined(MIMKERNELS_HAVE_AMX)
// Whether the CPU has AMX for bf16 and the system lets this process use it, which has to be asked
// for once: its registers are 8 KiB, saved only for those who do.
bool may_use_tiles() {
#if defined(MIMKERNELS_EMULATE_AVX512)
  return emulation::amx::start();
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first; what only tests want comes after the one that always runs. __builtin_cpu_supports
// also asks whether the operating system saves the registers.
int list_choices(Choice (&choices)[kChoices]) {
  int count = 0;
#if defined(MIMKERNELS_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
#if defined(MIMKERNELS_EMULATE_AVX512)
  const bool has_avx512 = has_avx2, has_avx512_bf16 = has_avx2;
#else
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx512_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  static const CpuKernels avx512_bf16_table = MIMKERNELS_WITH_BF16_PRODUCTS(avx512_bf16, avx512);
#if defined(MIMKERNELS_HAVE_AMX)
  static const CpuKernels amx_bf16_table = MIMKERNELS_WITH_BF16_PRODUCTS(amx_bf16, avx512);
  choices[count++] = {&amx_bf16_table, has_avx512_bf16 && may_use_tiles()};
#endif
  // Intel's dot product of bf16 pairs runs at half the rate of fused multiply-adds: converting to
  // fp32 is quicker there.
  const bool pairs_are_quick = !__builtin_cpu_is("intel");
  if (pairs_are_quick) choices[count++] = {&avx512_bf16_table, has_avx512_bf16};
  choices[count++] = {&avx512::kernel_table, has_avx512};
  if (!pairs_are_quick) choices[count++] = {&avx512_bf16_table, has_avx512_bf16};
  choices[count++] = {&avx2::kernel_table, has_avx2};
#endif
  choices[count++] = {&portable::kernel_table, true};
#if defined(MIMKERNELS_HAVE_AVX2_BF16)
  static const CpuKernels avx2_bf16_table = MIMKERNELS_WITH_BF16_PRODUCTS(avx2_bf16, avx2);
  choices[count++] = {&avx2_bf16_table, has_avx2};
  static const CpuKernels avx2_amx_table = MIMKERNELS_WITH_BF16_PRODUCTS(avx2_amx, avx2);
  choices[count++] = {&avx2_amx_table, has_avx2};
#endif
#if defined(MIMKERNELS_HAVE_AMX_EMULATION)
  static const CpuKernels amx_emulated_table = MIMKERNELS_WITH_BF16_PRODUCTS(amx_emulated, avx2);
  choices[count++] = {&amx_emulated_table, has_avx2, &emulation::amx::start};
#endif
  return count;
}

const CpuKernels* choose() {
  Choice choices[kChoices];
  const int count = list_choices(choices);
  const char* wanted = std::getenv("MIMKERNELS_CPU_ISA");
  std::string runnable;
  for (int i = 0; i < count; ++i) {
    if (!choices[i].runs_here) continue;
    runnable += runnable.empty() ? "" : ", ";
    runnable += choices[i].kernels->isa;
  }
  for (int i = 0; i < count; ++i) {
    if (wanted == nullptr || *wanted == '\0') {
      if (choices[i].runs_here) return choices[i].kernels;
      continue;
    }
    if (std::string(wanted) != choices[i].kernels->isa) continue;
    const auto start = choices[i].start;
    if (choices[i].runs_here && (start == nullptr || start())) return choices[i].kernels;
    throw std::invalid_argument("MIMKERNELS_CPU_ISA=" + std::string(wanted) +
                                ": this CPU does not support it; it runs: " + runnable);
  }
  throw std::invalid_argument(
      "MIMKERNELS_CPU_ISA=" + std::string(wanted) +
      " is not an instruction set of this library; this CPU runs: " + runnable);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const chosen = choose();
  return *chosen;
}

}  // namespace mimkernels

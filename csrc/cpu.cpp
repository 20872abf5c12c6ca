// Which instruction set the CPU kernels use: the widest that this processor has, unless another is asked for.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

#include "checks.h"
#include "cpu.h"

namespace vit_fast {

#define VIT_FAST_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels kernels; \
  }
VIT_FAST_DECLARE(portable)
#if defined(VIT_FAST_X86)
VIT_FAST_DECLARE(avx2)
VIT_FAST_DECLARE(avx512)
#endif

namespace {

struct InstructionSet {
  const Kernels* kernels;
  bool runs_here;
};

std::vector<InstructionSet> instruction_sets() {  // best first
  std::vector<InstructionSet> sets;
#if defined(VIT_FAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(VIT_FAST_AVX512_RUNS)  // a test compiled its 16 lanes for AVX2
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  sets.push_back({&avx512::kernels, avx512});
  sets.push_back({&avx2::kernels, avx2});
#endif
  sets.push_back({&portable::kernels, true});
  return sets;
}

const Kernels* best() {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.runs_here) return set.kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*> in_force{best()};

// Puts the named set in force ("auto": the best); the name of the one in force, for "" too, which changes nothing.
std::string instruction_set(std::string name) {
  if (name == "auto") in_force = best();
  if (name != "auto" && !name.empty()) {
    std::string known;
    const Kernels* found = nullptr;
    for (const InstructionSet& set : instruction_sets()) {
      known += (known.empty() ? "" : ", ") + std::string(set.kernels->name);
      if (name != set.kernels->name) continue;
      STD_TORCH_CHECK(set.runs_here, "instruction_set: this processor has no ", name);
      found = set.kernels;
    }
    STD_TORCH_CHECK(found, "instruction_set: must be auto, ", known, ", got '", name, "'");
    in_force = found;
  }
  return in_force.load()->name;
}

}  // namespace

const Kernels& kernels() { return *in_force.load(std::memory_order_relaxed); }

const char* set_with_panel(int64_t panel) {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.kernels->panel == panel) return set.kernels->name;
  }
  return nullptr;
}

}  // namespace vit_fast

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&vit_fast::instruction_set));
}

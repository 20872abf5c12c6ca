// The CPU kernels' operation, which the tests ask which of them are there: here the CUDA kernels stand in for them.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {
std::string instruction_set(std::string) { return "portable"; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpp, CompositeExplicitAutograd, m) { m.impl("instruction_set", TORCH_BOX(&instruction_set)); }

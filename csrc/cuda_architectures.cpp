// SPDX-License-Identifier: MIT
// What the kernels in CUDA are compiled for: a list as in TORCH_CUDA_ARCH_LIST, separated by
// spaces.
#include <torch/csrc/stable/library.h>

#include <string>

namespace dmfast {
namespace {

#ifdef DMFAST_CUDA
std::string cuda_architectures() { return DMFAST_CUDA_ARCHITECTURES; }
#else
std::string cuda_architectures() { return ""; }
#endif

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CompositeExplicitAutograd, m) {
  m.impl("_cuda_architectures", TORCH_BOX(&dmfast::cuda_architectures));
}

// SPDX-License-Identifier: MIT
#include "cpu_kernels.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu_isa.h"

namespace dmfast {
namespace {

std::string cpu_kernels() { return cpu_choice().text(); }

}  // namespace

const ConvBlockKernels& conv_block_kernels() {
  switch (cpu_choice().isa) {
#ifdef __x86_64__
    case Isa::kAvx512Bf16: return avx512_bf16::kernels;
    case Isa::kAvx512: return avx512::kernels;
    case Isa::kAvx2: return avx2::kernels;
#endif
    default: return plain::kernels;
  }
}

}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CompositeExplicitAutograd, m) {
  m.impl("_cpu_kernels", TORCH_BOX(&dmfast::cpu_kernels));
}

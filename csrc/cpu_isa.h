// SPDX-License-Identifier: MIT
// Which instructions the loops and kernels on the CPU may use: the best that the machine has, or
// what DMFAST_CPU asks for. They are compiled several times, each time in a source of its own with
// everything in an anonymous namespace. The network's kernels take the compiler's flags for that
// (setup.py). The other loops include every header, then target_avx2.h or target_avx512.h, and then
// the loops, which gcc on x86-64 then compiles for these; elsewhere they are compiled alike.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DMFAST_CPU_ISAS 1
#else
#define DMFAST_CPU_ISAS 0
#endif

namespace dmfast {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

// The best that the machine has.
Isa best_isa();

struct CpuChoice {
  Isa isa;
  bool direct;  // torch's layers in place of Winograd's algorithm, by the operators' wrappers

  std::string text() const;
};

// The environment variable DMFAST_CPU: a set's name, or that and `,direct`, or `direct` alone; read
// once. Throws where it is none of these or the CPU lacks the set.
const CpuChoice& cpu_choice();

// The one of three functions that is for this machine.
template <typename Function>
Function for_this_cpu(Function plain, Function avx2, Function avx512) {
  const Isa isa = cpu_choice().isa;
  return isa >= Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : plain;
}

}  // namespace dmfast

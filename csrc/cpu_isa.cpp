// SPDX-License-Identifier: MIT
#include "cpu_isa.h"

#include <cstdlib>
#include <string>

#include "check.h"

namespace dmfast {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16"};

CpuChoice choose() {
  CpuChoice choice{best_isa(), false};
  const char* variable = std::getenv("DMFAST_CPU");
  const std::string wanted = variable ? variable : "";
  std::string set = wanted;
  const auto comma = wanted.find(',');
  if (wanted == "direct" || (comma != std::string::npos && wanted.substr(comma) == ",direct")) {
    choice.direct = true;
    set = wanted == "direct" ? "" : wanted.substr(0, comma);
  }
  if (wanted.empty() || wanted == "direct") return choice;
  for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (set != kNames[static_cast<int>(isa)]) continue;
    check(isa <= choice.isa, "DMFAST_CPU: this CPU lacks ", set, "; its best set is ",
          kNames[static_cast<int>(choice.isa)]);
    choice.isa = isa;
    return choice;
  }
  check(false,
        "DMFAST_CPU must be avx512_bf16, avx512, avx2, plain or direct, or a set and direct ",
        "as in avx2,direct; got '", wanted, "'");
  return choice;
}

}  // namespace

Isa best_isa() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

std::string CpuChoice::text() const {
  return std::string(kNames[static_cast<int>(isa)]) + (direct ? ",direct" : "");
}

const CpuChoice& cpu_choice() {
  static const CpuChoice choice = choose();
  return choice;
}

}  // namespace dmfast

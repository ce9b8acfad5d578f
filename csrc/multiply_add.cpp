// SPDX-License-Identifier: MIT
// Multiply-adds between registers only, on all of torch's threads: the rate that no arithmetic on
// this CPU can exceed. By the best instructions that it has, whatever DMFAST_CPU says.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "cpu_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dmfast {
namespace {

// Independent sums: as many as hide the latency of a multiply-add in two pipes, and no more than
// fit into 16 registers with both factors.
constexpr int kChains = 12;

// A function that makes `rounds` rounds of the loop, and gives the floating-point operations of
// one, a multiply-add counting two. The empty assembly keeps the sums in registers from round to
// round, and the compiler from folding the loop.
#define DMFAST_LOOP(name, target, Vector, next, constraint, operations) \
  target int64_t name(int64_t rounds) {                                 \
    Vector sum[kChains] = {};                                           \
    for (int64_t round = 0; round < rounds; ++round) {                  \
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) {      \
        sum[i] = next;                                                  \
        __asm__ volatile("" : "+" constraint(sum[i]));                  \
      }                                                                 \
    }                                                                   \
    return kChains * (operations);                                      \
  }

#if defined(__x86_64__)
#define DMFAST_TARGET(set) __attribute__((target(set)))
DMFAST_LOOP(plain, , __m128, _mm_add_ps(_mm_mul_ps(sum[i], _mm_set1_ps(.5f)), _mm_set1_ps(.5f)),
            "x", 2 * 4)
DMFAST_LOOP(avx2, DMFAST_TARGET("avx2,fma"), __m256,
            _mm256_fmadd_ps(sum[i], _mm256_set1_ps(.5f), _mm256_set1_ps(.5f)), "x", 2 * 8)
DMFAST_LOOP(avx512, DMFAST_TARGET("avx512f"), __m512,
            _mm512_fmadd_ps(sum[i], _mm512_set1_ps(.5f), _mm512_set1_ps(.5f)), "v", 2 * 16)
// Pairs of bfloat16, of which any bits will do.
DMFAST_LOOP(avx512_bf16, DMFAST_TARGET("avx512f,avx512bf16"), __m512,
            _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_ps(.5f), (__m512bh)_mm512_set1_ps(.5f)),
            "v", 2 * 32)
#elif defined(__aarch64__)
DMFAST_LOOP(plain, , float32x4_t, vfmaq_n_f32(vdupq_n_f32(.5f), sum[i], .5f), "w", 2 * 4)
#else
DMFAST_LOOP(plain, , float, sum[i] * .5f + .5f, "m", 2)
#endif

int64_t float32_loop(int64_t rounds) {
#if defined(__x86_64__)
  const Isa isa = best_isa();
  if (isa >= Isa::kAvx512) return avx512(rounds);
  if (isa == Isa::kAvx2) return avx2(rounds);
#endif
  return plain(rounds);
}

int64_t bfloat16_loop(int64_t rounds) {
#if defined(__x86_64__)
  if (best_isa() == Isa::kAvx512Bf16) return avx512_bf16(rounds);
#endif
  return 0;
}

// The operations made; 0 where the CPU has no instruction for such products.
int64_t multiply_adds(int64_t rounds, bool bfloat16) {
  std::atomic<int64_t> made{0};
  torch::stable::parallel_for(
      0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
        const int64_t each = bfloat16 ? bfloat16_loop(rounds) : float32_loop(rounds);
        made += (end - begin) * rounds * each;
      });
  return made;
}

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CompositeExplicitAutograd, m) {
  m.impl("_multiply_adds", TORCH_BOX(&dmfast::multiply_adds));
}

// SPDX-License-Identifier: MIT
// Multiply-adds between registers only: the rate that no arithmetic on this CPU can exceed.
// Compiled and called by ceilings.py. Each function returns the floating-point operations of a
// round of its loop (a multiply-add counts two), 0 where the CPU lacks the instruction.

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif

typedef float vector __attribute__((vector_size(BYTES)));

// Independent sums: as many as hide the latency of a multiply-add in two pipes, and no more than
// fit into 16 registers with both factors.
enum { CHAINS = 12 };

// Keeps the sums in registers from round to round, and the compiler from folding the loop.
#ifdef __x86_64__
#define OPAQUE(value) __asm__ volatile("" : "+x"(value))
#else
#define OPAQUE(value) __asm__ volatile("" : "+w"(value))
#endif

long fma_float32(long rounds) {
  vector sum[CHAINS] = {0}, factor = {0};
  factor += 0.5f;
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) {
      sum[i] = sum[i] * factor + factor;
      OPAQUE(sum[i]);
    }
  }
  return 2 * CHAINS * (BYTES / sizeof(float));
}

#ifdef __AVX512BF16__
#include <immintrin.h>

long fma_bfloat16(long rounds) {
  __m512 sum[CHAINS] = {0};
  const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) {
      sum[i] = _mm512_dpbf16_ps(sum[i], factor, factor);
      OPAQUE(sum[i]);
    }
  }
  return 2 * CHAINS * 32;
}
#else
long fma_bfloat16(long rounds) {
  (void)rounds;
  return 0;
}
#endif

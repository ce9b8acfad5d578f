// SPDX-License-Identifier: MIT
// Rows of elements to the accumulation type and back, as vectors; see cpu_isa.h for how this is
// compiled.
#pragma once

#include "loop_headers.h"

namespace dmfast {
namespace {

template <typename T, typename acc_t>
void widen(const T* from, int64_t count, acc_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<acc_t>(from[i]);
}

template <typename T, typename acc_t>
void narrow(const acc_t* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

// The conversions of the types themselves, in words that gcc turns into vectors.
inline void widen(const c10::BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].x) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

inline void narrow(const float* from, int64_t count, c10::BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    to[i].x = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

#ifdef DMFAST_F16C
inline void widen(const c10::Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline void narrow(const float* from, int64_t count, c10::Half* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < count; ++i) to[i] = static_cast<c10::Half>(from[i]);
}
#endif

}  // namespace
}  // namespace dmfast

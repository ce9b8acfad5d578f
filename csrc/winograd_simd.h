// SPDX-License-Identifier: MIT
// Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016) on vectors of channels: 16 outputs of a 3x3
// convolution from 36 products a pair of channels in place of 144. Included by one source for each
// instruction set: everything is in an anonymous namespace and nothing comes from the standard
// library, so that no linker takes a function compiled for one processor for another's.
#pragma once

#include <cstdint>

#include "conv_block.h"

#ifdef DMFAST_BF16_PRODUCTS
#include <immintrin.h>
#endif

#define DMFAST_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define DMFAST_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define DMFAST_UNROLLED _Pragma("GCC unroll 40")
#endif

namespace dmfast {
namespace {

constexpr int64_t kLanes = DMFAST_LANES;
using Vector = float __attribute__((vector_size(DMFAST_LANES * sizeof(float))));
using Integers = uint32_t __attribute__((vector_size(DMFAST_LANES * sizeof(float))));

DMFAST_INLINE Vector load(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

DMFAST_INLINE void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

DMFAST_INLINE Vector splat(float value) { return value - Vector{}; }

// 0 for what is below it, and NaN for NaN, as torch's.
DMFAST_INLINE Vector relu(Vector value) { return value < 0.0f ? Vector{} : value; }

DMFAST_INLINE float sum_of_lanes(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

DMFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DMFAST_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- What the factors of the products are kept in ----------------------------------------------

struct Float32 {
  using Element = float;
  static constexpr int64_t kPair = 1;  // channels that are multiplied and summed at once
  static DMFAST_INLINE void put(float* to, Vector value) { store(to, value); }
};

// Rounded to the nearest bfloat16, to even on a tie, and kept in a float: for processors without
// products of bfloat16.
struct RoundedFloat32 {
  using Element = float;
  static constexpr int64_t kPair = 1;
  static DMFAST_INLINE Vector round(Vector value) {
    Integers bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const Integers rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    Vector result;
    __builtin_memcpy(&result, &rounded, sizeof result);
    return value == value ? result : value;
  }
  static DMFAST_INLINE void put(float* to, Vector value) { store(to, round(value)); }
};

#ifdef DMFAST_BF16_PRODUCTS
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int64_t kPair = 2;
  static DMFAST_INLINE void put(uint16_t* to, Vector value) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)value);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
  }
};
#else
using BFloat16 = RoundedFloat32;
#endif

// ---- Transforms in one dimension ---------------------------------------------------------------

// Polynomials are multiplied by way of their values at 0, +-kNear, +-kFar and infinity. With these
// two, rounding is amplified half as much as with the usual 1 and 2: half the error of the result,
// in float32 and with products of bfloat16 alike. All powers that are used are exact.
constexpr float kNear = 0.625f, kFar = 1.5f;
constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;
constexpr float kNear3 = kNear2 * kNear, kFar3 = kFar2 * kFar;

// B^T d: six inputs into the domain.
template <typename T>
DMFAST_INLINE void into_domain(const T* d, T* v) {
  const T near_even = d[4] - kFar2 * d[2], near_odd = d[3] - kFar2 * d[1];
  const T far_even = d[4] - kNear2 * d[2], far_odd = d[3] - kNear2 * d[1];
  v[0] = kNear2 * kFar2 * d[0] + (d[4] - (kNear2 + kFar2) * d[2]);
  v[1] = near_even + kNear * near_odd;
  v[2] = near_even - kNear * near_odd;
  v[3] = far_even + kFar * far_odd;
  v[4] = far_even - kFar * far_odd;
  v[5] = kNear2 * kFar2 * d[1] + (d[5] - (kNear2 + kFar2) * d[3]);
}

// A^T m: six products to four outputs.
template <typename T>
DMFAST_INLINE void out_of_domain(const T* m, T* y) {
  const T near = m[1] + m[2], near_odd = m[1] - m[2];
  const T far = m[3] + m[4], far_odd = m[3] - m[4];
  y[0] = m[0] + near + far;
  y[1] = kNear * near_odd + kFar * far_odd;
  y[2] = kNear2 * near + kFar2 * far;
  y[3] = kNear3 * near_odd + (kFar3 * far_odd + m[5]);
}

// A y: four gradients of outputs to six of products.
template <typename T>
DMFAST_INLINE void gradient_into_domain(const T* y, T* m) {
  const T near_even = y[0] + kNear2 * y[2], near_odd = kNear * y[1] + kNear3 * y[3];
  const T far_even = y[0] + kFar2 * y[2], far_odd = kFar * y[1] + kFar3 * y[3];
  m[0] = y[0];
  m[1] = near_even + near_odd;
  m[2] = near_even - near_odd;
  m[3] = far_even + far_odd;
  m[4] = far_even - far_odd;
  m[5] = y[3];
}

// The divisors of the weights at the points: products of their distances to the others.
constexpr float kAtZero = 1 / (kNear2 * kFar2);
constexpr float kAtNear = 1 / (2 * kNear2 * (kNear2 - kFar2));
constexpr float kAtFar = 1 / (2 * kFar2 * (kFar2 - kNear2));

// G g: three weights into the domain.
template <typename T>
DMFAST_INLINE void weights_into_domain(const T* g, T* u) {
  const T near = (g[0] + kNear2 * g[2]) * kAtNear, far = (g[0] + kFar2 * g[2]) * kAtFar;
  u[0] = g[0] * kAtZero;
  u[1] = near + g[1] * (kNear * kAtNear);
  u[2] = near - g[1] * (kNear * kAtNear);
  u[3] = far + g[1] * (kFar * kAtFar);
  u[4] = far - g[1] * (kFar * kAtFar);
  u[5] = g[2];
}

// G^T u: six gradients in the domain to three of weights.
template <typename T>
DMFAST_INLINE void weights_out_of_domain(const T* u, T* g) {
  const T near = (u[1] + u[2]) * kAtNear, far = (u[3] + u[4]) * kAtFar;
  g[0] = u[0] * kAtZero + near + far;
  g[1] = (u[1] - u[2]) * (kNear * kAtNear) + (u[3] - u[4]) * (kFar * kAtFar);
  g[2] = kNear2 * near + kFar2 * far + u[5];
}

// Both dimensions: out[i][j] of a matrix of kFrom x kFrom, given by its element (i, j).
template <int kFrom, int kTo, typename T, typename Apply, typename At, typename Put>
DMFAST_INLINE void in_both_dimensions(const Apply& apply, const At& at, const Put& put) {
  T half[kTo][kFrom];
  DMFAST_UNROLLED
  for (int j = 0; j < kFrom; ++j) {
    T column[kFrom], out[kTo];
    DMFAST_UNROLLED
    for (int i = 0; i < kFrom; ++i) column[i] = at(i, j);
    apply(column, out);
    DMFAST_UNROLLED
    for (int i = 0; i < kTo; ++i) half[i][j] = out[i];
  }
  DMFAST_UNROLLED
  for (int i = 0; i < kTo; ++i) {
    T out[kTo];
    apply(half[i], out);
    DMFAST_UNROLLED
    for (int j = 0; j < kTo; ++j) put(i, j, out[j]);
  }
}

// ---- Products ----------------------------------------------------------------------------------

// m[r][k] = sum over c of a[r][c] b[c][k], for kRows rows and kVectors vectors of k.
template <int kRows, int kVectors>
DMFAST_INLINE void multiply_rows(const float* a, int64_t a_row, const float* b, int64_t depth,
                                 float* m) {
  Vector sums[kRows][kVectors];
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  for (int64_t c = 0; c < depth; ++c) {
    Vector row[kVectors];
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + (c * kVectors + v) * kLanes);
    DMFAST_UNROLLED
    for (int r = 0; r < kRows; ++r) {
      DMFAST_UNROLLED
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r * a_row + c] * row[v];
    }
  }
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) store(m + (r * kVectors + v) * kLanes, sums[r][v]);
  }
}

// sums[c][k] += sum over t of a[t][c] b[t][k], for kRows values of c and kVectors vectors of k.
template <int kRows, int kVectors>
DMFAST_INLINE void multiply_columns(const float* a, int64_t a_row, const float* b, int64_t b_row,
                                    int64_t depth, float* sums_out, int64_t sums_row) {
  Vector sums[kRows][kVectors];
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(sums_out + r * sums_row + v * kLanes);
  }
  for (int64_t t = 0; t < depth; ++t) {
    Vector row[kVectors];
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + t * b_row + v * kLanes);
    DMFAST_UNROLLED
    for (int r = 0; r < kRows; ++r) {
      DMFAST_UNROLLED
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[t * a_row + r] * row[v];
    }
  }
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) store(sums_out + r * sums_row + v * kLanes, sums[r][v]);
  }
}

#ifdef DMFAST_BF16_PRODUCTS
DMFAST_INLINE __m512bh pair_of(const uint16_t* a) {
  int32_t both;
  __builtin_memcpy(&both, a, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

// As for float32; b holds pairs of consecutive c for each k.
template <int kRows, int kVectors>
DMFAST_INLINE void multiply_rows(const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t depth,
                                 float* m) {
  __m512 sums[kRows][kVectors];
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < depth; c += 2) {
    __m512bh row[kVectors];
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) {
      row[v] = (__m512bh)_mm512_loadu_si512(b + (c * kVectors + 2 * v) * kLanes);
    }
    DMFAST_UNROLLED
    for (int r = 0; r < kRows; ++r) {
      const __m512bh both = pair_of(a + r * a_row + c);
      DMFAST_UNROLLED
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, row[v]);
    }
  }
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(m + (r * kVectors + v) * kLanes, sums[r][v]);
    }
  }
}

// As for float32; a and b hold pairs of consecutive t for each c and k.
template <int kRows, int kVectors>
DMFAST_INLINE void multiply_columns(const uint16_t* a, int64_t a_row, const uint16_t* b,
                                    int64_t b_row, int64_t depth, float* sums_out,
                                    int64_t sums_row) {
  __m512 sums[kRows][kVectors];
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = _mm512_loadu_ps(sums_out + r * sums_row + v * kLanes);
    }
  }
  for (int64_t t = 0; t < depth; t += 2) {
    __m512bh row[kVectors];
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) {
      row[v] = (__m512bh)_mm512_loadu_si512(b + t * b_row + 2 * v * kLanes);
    }
    DMFAST_UNROLLED
    for (int r = 0; r < kRows; ++r) {
      const __m512bh both = pair_of(a + t * a_row + 2 * r);
      DMFAST_UNROLLED
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, row[v]);
    }
  }
  DMFAST_UNROLLED
  for (int r = 0; r < kRows; ++r) {
    DMFAST_UNROLLED
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(sums_out + r * sums_row + v * kLanes, sums[r][v]);
    }
  }
}

// Rows [2, count] to pairs [count, 2]; the second row is zeros where there is `one` only.
DMFAST_INLINE void interleave(const uint16_t* rows, int64_t count, bool one, uint16_t* pairs) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const auto half = [&](int64_t row) {
      return _mm512_maskz_cvtepu16_epi32(
          0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + row * count + c)));
    };
    const __m512i second =
        one ? _mm512_setzero_si512() : _mm512_maskz_slli_epi32(0xffff, half(1), 16);
    _mm512_storeu_si512(pairs + 2 * c, _mm512_or_si512(half(0), second));
  }
}
#endif

}  // namespace
}  // namespace dmfast

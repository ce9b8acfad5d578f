// SPDX-License-Identifier: MIT
// The element types of the operators in kernels: 16-bit floats as their bits, converted by the
// GPU's instructions, or by the same rounding (to nearest, ties to even) under a host compiler.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_host.h"
#include "dtype.h"
#include "host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dmfast {

#if !defined(__CUDACC__)
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

struct Half {
  uint16_t bits;

  Half() = default;
  DMFAST_HD explicit Half(float value) {
#if defined(__CUDACC__)
    bits = __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t all = float_bits(value), sign = all >> 16 & 0x8000, size = all & 0x7FFFFFFF;
    if (size > 0x7F800000) {
      bits = 0x7FFF;  // what a GPU makes of every NaN
    } else if (size >= 0x47800000) {
      bits = static_cast<uint16_t>(sign | 0x7C00);
    } else if (size >= 0x38800000) {  // normal: 13 bits are rounded away, which may carry upwards
      bits = static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
    } else {  // adding 0.5 leaves multiples of 2^-24 in the low bits, rounded by the addition
      bits = static_cast<uint16_t>(sign | (float_bits(bits_float(size) + 0.5f) - 0x3F000000));
    }
#endif
  }
  DMFAST_HD explicit operator float() const {
#if defined(__CUDACC__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 0x1F;
    const uint32_t fraction = bits & 0x3FF;
    if (exponent == 0x1F) return bits_float(sign | 0x7F800000 | fraction << 13);
    if (exponent != 0) return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float size = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -size : size;
#endif
  }
  DMFAST_HD explicit operator double() const { return static_cast<float>(*this); }
};

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  DMFAST_HD explicit BFloat16(float value) {
#if defined(__CUDACC__)
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t all = float_bits(value);
    const bool nan = (all & 0x7FFFFFFF) > 0x7F800000;
    bits = nan ? 0x7FFF : static_cast<uint16_t>((all + 0x7FFF + (all >> 16 & 1)) >> 16);
#endif
  }
  DMFAST_HD explicit operator float() const {
#if defined(__CUDACC__)
    return __bfloat162float(__ushort_as_bfloat16(bits));
#else
    return bits_float(uint32_t{bits} << 16);
#endif
  }
  DMFAST_HD explicit operator double() const { return static_cast<float>(*this); }
};

// Several elements that are loaded or stored by one instruction, from an address that is a
// multiple of their size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T element[kCount];
};

// As many as the widest load takes.
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

inline bool is_aligned(const void* data, int64_t multiple) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uint64_t>(multiple) == 0;
}

// Calls body(T{}) with the element type that dtype names and returns what it returns.
template <typename Body>
int with_cuda_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64: return body(double{});
    case DType::kFloat32: return body(float{});
    case DType::kFloat16: return body(Half{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kUInt8: break;
  }
  return 1;  // cudaErrorInvalidValue
}

}  // namespace dmfast

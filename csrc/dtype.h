// SPDX-License-Identifier: MIT
// The element types of the operators by name, without any of their C++ types: torch's on the CPU
// (cpu_types.h), our own in kernels (cuda_types.h).
#pragma once

namespace dmfast {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16, kUInt8 };

// Arithmetic is done in float, except on doubles.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace dmfast

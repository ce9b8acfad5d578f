// SPDX-License-Identifier: MIT
// The element types of the operators on the CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "dtype.h"

namespace dmfast {

// Calls body(T{}) with the element type that dtype names.
template <typename Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64: return body(double{});
    case DType::kFloat32: return body(float{});
    case DType::kFloat16: return body(c10::Half{});
    case DType::kBFloat16: return body(c10::BFloat16{});
    case DType::kUInt8: return body(uint8_t{});
  }
}

}  // namespace dmfast

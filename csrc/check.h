// SPDX-License-Identifier: MIT
// One phrasing for every error: "<operator>: <argument> must be <what>, got <value>".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "philox.h"

namespace dmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Unlike STD_TORCH_CHECK this leaves file and line out: the reader is a user of the operator.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape(const std::vector<int64_t>& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

inline std::string shape(const Tensor& tensor) { return shape(sizes_of(tensor)); }

// allocate() makes a tensor of these sizes; torch's own report of too large a one names no
// operator.
template <typename Allocate>
Tensor allocated(const char* op, const std::vector<int64_t>& sizes, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    check(false, op, ": no memory for a tensor of shape ", shape(sizes));
    throw;
  }
}

inline Tensor contiguous(const char* op, const Tensor& tensor) {
  return allocated(op, sizes_of(tensor), [&] { return torch::stable::contiguous(tensor); });
}

inline Tensor new_tensor(const char* op, const Tensor& like, const std::vector<int64_t>& sizes,
                         ScalarType dtype) {
  return allocated(op, sizes, [&] { return torch::stable::new_empty(like, sizes, dtype); });
}

inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

inline void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank,
                       const char* layout) {
  check(tensor.dim() == rank, op, ": ", argument, " must have shape ", layout, ", got ",
        shape(tensor));
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor,
                        ScalarType type) {
  check(tensor.scalar_type() == type, op, ": ", argument, " must be ", name(type), ", got ",
        name(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* argument, const Tensor& tensor,
                              const char* other_argument, const Tensor& other) {
  check(tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index(),
        op, ": ", argument, " must be on the device of ", other_argument);
}

inline DType floating_dtype(const char* op, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  check(false, op, ": ", argument, " must be float64, float32, float16 or bfloat16, got ",
        name(type));
  return DType::kFloat32;
}

// Written to in place, so no element may be another as well: along the axes by ascending stride,
// each must step over all that the ones before it reach.
inline void check_no_overlap(const char* op, const char* argument, int64_t number,
                             const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) axes.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(axes.begin(), axes.end());
  int64_t reached = 0;
  for (const auto& [stride, size] : axes) {
    check(stride > reached, op, ": ", argument, " ", number,
          " must not overlap itself (expanded, say): its elements share memory; clone it first");
    reached += stride * (size - 1);
  }
}

// Groups of rows: rows offsets[g] to offsets[g + 1] - 1 belong to group g; without offsets the rows
// are split evenly.
struct Groups {
  const int64_t* offsets;  // null: evenly
  int64_t groups, rows;

  int64_t first(int64_t group) const {
    return offsets ? offsets[group] : (groups ? rows / groups * group : 0);
  }
};

// Offsets on the CPU are read, so they are checked.
inline Groups cpu_groups(const char* op, const char* argument, const std::optional<Tensor>& offsets,
                         int64_t groups, int64_t rows) {
  if (!offsets) {
    check(groups > 0 ? rows % groups == 0 : rows == 0, op, ": without ", argument, " the ", rows,
          " rows must divide evenly into the ", groups, " groups");
    return {nullptr, groups, rows};
  }
  check_rank(op, argument, *offsets, 1, "[groups + 1]");
  check_dtype(op, argument, *offsets, ScalarType::Long);
  check(offsets->is_cpu(), op, ": ", argument, " must be on the CPU, as the rows are");
  check(offsets->is_contiguous(), op, ": ", argument, " must be contiguous");
  check(offsets->size(0) == groups + 1, op, ": ", argument, " must have ", groups + 1,
        " elements (groups + 1), got ", offsets->size(0));
  const int64_t* data = offsets->const_data_ptr<int64_t>();
  check(data[0] == 0, op, ": ", argument, " must start at 0, got ", data[0]);
  for (int64_t g = 0; g < groups; ++g) {
    check(data[g] <= data[g + 1], op, ": ", argument, " must ascend, got ", data[g], " before ",
          data[g + 1], " at position ", g);
  }
  check(data[groups] == rows, op, ": ", argument, " must end at the number of rows ", rows,
        ", got ", data[groups]);
  return {data, groups, rows};
}

// Offsets of rows that lie where `like` does. On a GPU their values are not read: kernels clamp
// them.
inline Groups checked_groups(const char* op, const char* argument,
                             const std::optional<Tensor>& offsets, int64_t groups, int64_t rows,
                             const Tensor& like) {
  if (like.is_cpu() || !offsets) return cpu_groups(op, argument, offsets, groups, rows);
  check_rank(op, argument, *offsets, 1, "[groups + 1]");
  check_dtype(op, argument, *offsets, ScalarType::Long);
  check_same_device(op, argument, *offsets, "the rows", like);
  check(offsets->is_contiguous(), op, ": ", argument, " must be contiguous");
  check(offsets->size(0) == groups + 1, op, ": ", argument, " must have ", groups + 1,
        " elements (groups + 1), got ", offsets->size(0));
  return {offsets->const_data_ptr<int64_t>(), groups, rows};
}

inline Draw draw_key(const char* op, int64_t seed, int64_t step,
                     const std::optional<Tensor>& step_tensor, int64_t stream) {
  if (step_tensor) {
    check_dtype(op, "step", *step_tensor, ScalarType::Long);
    check(step_tensor->numel() == 1, op, ": step must have one element, got ",
          step_tensor->numel());
    check(step_tensor->is_cpu(), op, ": step must be on the device of the other tensors");
    step = *step_tensor->const_data_ptr<int64_t>();
  }
  check(seed >= 0, op, ": seed must be 0 or more, got ", seed);
  check(step >= 0 && step <= UINT32_MAX, op, ": step must be from 0 to 2^32 - 1, got ", step);
  check(stream >= 0 && stream <= UINT32_MAX, op, ": stream must be from 0 to 2^32 - 1, got ",
        stream);
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
}

// `count` groups from `first` on, 0 or more, must have 32-bit numbers.
inline void check_numbers(const char* op, const char* argument, int64_t first, int64_t count) {
  check(first >= 0 && first <= UINT32_MAX && count <= int64_t{UINT32_MAX} + 1 - first, op, ": ",
        argument, " must be from 0 to 2^32 - 1, got ", count, " from ", first, " on");
}

}  // namespace dmfast

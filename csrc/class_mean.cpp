// SPDX-License-Identifier: MIT
// class_mean_discrepancy (equation 5 of the paper, summed over classes) and the class means that
// it is made of: checks, allocation, dispatch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "class_mean_cpu.h"
#include "class_mean_cuda.h"
#include "cpu_types.h"
#include "stable_compat.h"

namespace dmfast {
namespace {

ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

char* bytes(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }
const char* const_bytes(const Tensor& tensor) {
  return static_cast<const char*>(tensor.const_data_ptr());
}
int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

#ifdef DMFAST_CUDA
ClampedGroups clamped(const Groups& groups) { return {groups.offsets, groups.groups, groups.rows}; }

// Rows that are apart are read where they lie; their elements must be adjacent.
Tensor readable(const char* op, const Tensor& rows) {
  return rows.stride(1) == 1 ? rows : contiguous(op, rows);
}

Embeddings embeddings(const char* op, const char* argument, const Tensor& rows,
                      const Groups& groups) {
  return {rows.const_data_ptr(), floating_dtype(op, argument, rows.scalar_type()), rows.stride(0),
          clamped(groups)};
}

Tensor class_means_cuda(const char* op, const char* argument, const Tensor& rows,
                        const Groups& groups, ScalarType acc_type) {
  const Tensor dense = readable(op, rows);
  const Embeddings from = embeddings(op, argument, dense, groups);
  Tensor means = new_tensor(op, rows, {groups.groups, rows.size(1)}, acc_type);
  launch_on(op, rows, [&](void* stream) {
    return class_mean_launch(from, rows.size(1), acc_type == ScalarType::Double,
                             means.mutable_data_ptr(), stream);
  });
  return means;
}
#endif

// rows [N, D], offsets [classes + 1] -> [classes, D] in the accumulation type
Tensor class_means(const char* op, const char* argument, const Tensor& rows, const Groups& groups) {
  const DType dtype = floating_dtype(op, argument, rows.scalar_type());
  const Tensor dense = contiguous(op, rows);
  const int64_t width = rows.size(1);
  const ScalarType acc_type = accumulation_type(rows.scalar_type());
  Tensor means = new_tensor(op, rows, {groups.groups, width}, acc_type);
  if (means.numel() == 0) return means;
  const char* from = const_bytes(dense);
  char* to = bytes(means);
  // Tasks are classes, or runs of columns where these are few.
  const int64_t columns = groups.groups < 8 ? 512 : width, runs = (width + columns - 1) / columns;
  torch::stable::parallel_for(0, groups.groups * runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / runs, first = groups.first(k);
      const int64_t d = task % runs * columns;
      class_mean_range(from + first * width * element_size(rows.scalar_type()), dtype,
                       groups.first(k + 1) - first, width, d, std::min(d + columns, width),
                       to + k * width * element_size(acc_type));
    }
  });
  return means;
}

Groups checked_classes(const char* op, const char* argument, const char* offsets_argument,
                       const Tensor& rows, int64_t classes, const std::optional<Tensor>& offsets) {
  check_rank(op, argument, rows, 2, "[rows, features]");
  check(classes >= 0, op, ": classes must be 0 or more, got ", classes);
  return checked_groups(op, offsets_argument, offsets, classes, rows.size(0), rows);
}

Tensor class_mean(const Tensor& rows, int64_t classes, std::optional<Tensor> offsets) {
  const char* op = "class_mean";
  const Groups groups = checked_classes(op, "rows", "offsets", rows, classes, offsets);
#ifdef DMFAST_CUDA
  if (!rows.is_cpu()) {
    return class_means_cuda(op, "rows", rows, groups, accumulation_type(rows.scalar_type()));
  }
#endif
  return class_means(op, "rows", rows, groups);
}

// gradient [classes, D] -> [rows, D] in dtype
Tensor class_mean_backward(const Tensor& gradient, int64_t rows, std::optional<Tensor> offsets,
                           ScalarType dtype) {
  const char* op = "class_mean_backward";
  check_rank(op, "gradient", gradient, 2, "[classes, features]");
  const DType row_dtype = floating_dtype(op, "dtype", dtype);
  const ScalarType acc_type = accumulation_type(dtype);
  check_dtype(op, "gradient", gradient, acc_type);
  const Groups groups = checked_groups(op, "offsets", offsets, gradient.size(0), rows, gradient);
  const Tensor dense = contiguous(op, gradient);
  const int64_t width = gradient.size(1);
  Tensor result = new_tensor(op, gradient, {rows, width}, dtype);
  if (result.numel() == 0) return result;
#ifdef DMFAST_CUDA
  if (!gradient.is_cpu()) {
    launch_on(op, gradient, [&](void* stream) {
      return class_mean_backward_launch(dense.const_data_ptr(), row_dtype, clamped(groups), width,
                                        result.mutable_data_ptr(), stream);
    });
    return result;
  }
#endif
  const char* from = const_bytes(dense);
  char* to = bytes(result);
  torch::stable::parallel_for(0, groups.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = groups.first(k), count = groups.first(k + 1) - first;
      class_mean_backward_rows(from + k * width * element_size(acc_type), row_dtype, count, width,
                               to + first * width * element_size(dtype));
    }
  });
  return result;
}

#ifdef DMFAST_CUDA
std::tuple<Tensor, Tensor> discrepancy_cuda(const char* op, const Tensor& real, const Tensor& syn,
                                            const Groups& real_groups, const Groups& syn_groups) {
  const bool doubles =
      real.scalar_type() == ScalarType::Double || syn.scalar_type() == ScalarType::Double;
  const ScalarType acc_type = doubles ? ScalarType::Double : ScalarType::Float;
  const int64_t width = real.size(1);
  const Tensor dense_syn = readable(op, syn);
  const Embeddings from = embeddings(op, "syn", dense_syn, syn_groups);
  Tensor difference = class_means_cuda(op, "real", real, real_groups, acc_type);
  Tensor loss = torch::stable::new_empty(difference, {});
  Tensor sums =
      torch::stable::new_empty(difference, {class_mean_workspace(real_groups.groups, width)});
  launch_on(op, real, [&](void* stream) {
    return class_mean_discrepancy_launch(clamped(real_groups), from, width, doubles,
                                         difference.mutable_data_ptr(), loss.mutable_data_ptr(),
                                         sums.mutable_data_ptr(), stream);
  });
  return {loss, difference};
}
#endif

// real [N, D], syn [M, D] -> loss [], difference of the means [classes, D]
std::tuple<Tensor, Tensor> class_mean_discrepancy(const Tensor& real, const Tensor& syn,
                                                  int64_t classes,
                                                  std::optional<Tensor> real_offsets,
                                                  std::optional<Tensor> syn_offsets) {
  const char* op = "class_mean_discrepancy";
  const Groups real_groups =
      checked_classes(op, "real", "real_offsets", real, classes, real_offsets);
  const Groups syn_groups = checked_classes(op, "syn", "syn_offsets", syn, classes, syn_offsets);
  check(real.size(1) == syn.size(1), op, ": real and syn must have as many features, got ",
        real.size(1), " and ", syn.size(1));
  check_same_device(op, "syn", syn, "real", real);
  // Without offsets the classes are alike: one stands for all. Offsets on a GPU are not read.
  const bool alike = !real_offsets && !syn_offsets;
  const int64_t distinct = alike ? std::min<int64_t>(classes, 1) : real.is_cpu() ? classes : 0;
  for (int64_t k = 0; k < distinct; ++k) {
    check((real_groups.first(k + 1) > real_groups.first(k)) ==
              (syn_groups.first(k + 1) > syn_groups.first(k)),
          op, ": class ", k, " has rows on one side only");
  }
#ifdef DMFAST_CUDA
  if (!real.is_cpu()) return discrepancy_cuda(op, real, syn, real_groups, syn_groups);
#endif
  const bool doubles =
      real.scalar_type() == ScalarType::Double || syn.scalar_type() == ScalarType::Double;
  // A side of another type is converted first, so that both are accumulated in float64.
  const auto side = [&](const Tensor& rows) {
    if (!doubles) return rows;
    return allocated(op, sizes_of(rows),
                     [&] { return torch::stable::to(rows, ScalarType::Double); });
  };
  const Tensor difference = class_means(op, "real", side(real), real_groups);
  const Tensor syn_means = class_means(op, "syn", side(syn), syn_groups);
  Tensor loss = torch::stable::new_empty(difference, {});
  const DType dtype = doubles ? DType::kFloat64 : DType::kFloat32;
  const int64_t width = real.size(1);
  with_dtype(dtype, [&](auto element) {
    using acc_t = typename Accumulator<decltype(element)>::type;
    acc_t* values = reinterpret_cast<acc_t*>(bytes(difference));
    const acc_t* others = reinterpret_cast<const acc_t*>(const_bytes(syn_means));
    for (int64_t i = 0; i < classes * width; ++i) values[i] -= others[i];
  });
  sum_of_squares(const_bytes(difference), dtype, width > 0 ? classes : 0, width, bytes(loss));
  return {loss, difference};
}

}  // namespace
}  // namespace dmfast

STABLE_TORCH_LIBRARY_IMPL(dmfast, CPU, m) {
  m.impl("class_mean_discrepancy", TORCH_BOX(&dmfast::class_mean_discrepancy));
  m.impl("_class_mean", TORCH_BOX(&dmfast::class_mean));
  m.impl("_class_mean_backward", TORCH_BOX(&dmfast::class_mean_backward));
}

#ifdef DMFAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(dmfast, CUDA, m) {
  m.impl("class_mean_discrepancy", TORCH_BOX(&dmfast::class_mean_discrepancy));
  m.impl("_class_mean", TORCH_BOX(&dmfast::class_mean));
  m.impl("_class_mean_backward", TORCH_BOX(&dmfast::class_mean_backward));
}
#endif

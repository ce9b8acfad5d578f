// SPDX-License-Identifier: MIT
#include "class_mean_cpu.h"

#include <algorithm>

#include "cpu_types.h"

namespace dmfast {
namespace {

// Rounding grows with the length of a chain of additions: sums of short runs are summed in turn.
// The order depends on the sizes alone, so that the result has the same bits on any number of
// threads.
constexpr int64_t kRun = 16;
constexpr int64_t kColumnsAtOnce = 256;  // three rows of these in accumulators fit any L1

}  // namespace

void class_mean_range(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                      int64_t end, void* mean) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using acc_t = typename Accumulator<T>::type;
    const T* from = static_cast<const T*>(rows);
    acc_t* to = static_cast<acc_t*>(mean);
    for (int64_t d0 = begin; d0 < end; d0 += kColumnsAtOnce) {
      const int64_t columns = std::min(kColumnsAtOnce, end - d0);
      acc_t total[kColumnsAtOnce] = {};
      for (int64_t first = 0; first < count; first += kRun) {
        acc_t run[kColumnsAtOnce] = {};
        for (int64_t row = first; row < std::min(first + kRun, count); ++row) {
          const T* values = from + row * width + d0;
          for (int64_t d = 0; d < columns; ++d) run[d] += static_cast<acc_t>(values[d]);
        }
        for (int64_t d = 0; d < columns; ++d) total[d] += run[d];
      }
      for (int64_t d = 0; d < columns; ++d) {
        to[d0 + d] = count > 0 ? total[d] / static_cast<acc_t>(count) : acc_t(0);
      }
    }
  });
}

void class_mean_backward_rows(const void* mean_gradient, DType dtype, int64_t count, int64_t width,
                              void* rows) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using acc_t = typename Accumulator<T>::type;
    const acc_t* from = static_cast<const acc_t*>(mean_gradient);
    T* first_row = static_cast<T*>(rows);
    if (count == 0) return;
    for (int64_t d = 0; d < width; ++d) {
      first_row[d] = static_cast<T>(from[d] / static_cast<acc_t>(count));
    }
    for (int64_t row = 1; row < count; ++row) {
      std::copy_n(first_row, width, first_row + row * width);
    }
  });
}

void sum_of_squares(const void* values, DType dtype, int64_t classes, int64_t width, void* sum) {
  with_dtype(dtype, [&](auto element) {
    using acc_t = typename Accumulator<decltype(element)>::type;
    const acc_t* from = static_cast<const acc_t*>(values);
    acc_t total = 0;
    for (int64_t k = 0; k < classes; ++k) {
      acc_t class_total = 0;
      for (int64_t first = 0; first < width; first += kRun) {
        acc_t run = 0;
        for (int64_t d = first; d < std::min(first + kRun, width); ++d) {
          run += from[k * width + d] * from[k * width + d];
        }
        class_total += run;
      }
      total += class_total;
    }
    *static_cast<acc_t*>(sum) = total;
  });
}

}  // namespace dmfast

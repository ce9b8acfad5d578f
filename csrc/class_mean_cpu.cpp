// SPDX-License-Identifier: MIT
#include "class_mean_cpu.h"

#include <algorithm>
#include <type_traits>

#include "class_mean_isa.h"
#include "cpu_isa.h"
#include "cpu_types.h"

namespace dmfast {
namespace {

constexpr int64_t kRun = 16;  // see class_mean_loops.h

}  // namespace

void class_mean_range(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                      int64_t end, void* mean) {
  static const auto loop = for_this_cpu(&class_mean_plain, &class_mean_avx2, &class_mean_avx512);
  loop(rows, dtype, count, width, begin, end, mean);
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

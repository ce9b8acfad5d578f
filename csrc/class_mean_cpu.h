// SPDX-License-Identifier: MIT
// The loops of the class-mean operators on the CPU, over raw pointers.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dmfast {

// rows [count, width] of one class, in dtype, to their mean over columns begin <= d < end, in the
// accumulation type. A class without rows has mean 0.
void class_mean_range(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                      int64_t end, void* mean);

// mean_gradient [width] in the accumulation type to the gradient of each row, [count, width].
void class_mean_backward_rows(const void* mean_gradient, DType dtype, int64_t count, int64_t width,
                              void* rows);

// Sum of the squares of values [classes, width], in the accumulation type of dtype.
void sum_of_squares(const void* values, DType dtype, int64_t classes, int64_t width, void* sum);

}  // namespace dmfast

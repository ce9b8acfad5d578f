// SPDX-License-Identifier: MIT
// The loop of class_mean_loops.h by the instructions that it is compiled for; arguments as those of
// class_mean_range.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dmfast {

void class_mean_plain(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                      int64_t end, void* mean);
void class_mean_avx2(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                     int64_t end, void* mean);
void class_mean_avx512(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                       int64_t end, void* mean);

}  // namespace dmfast

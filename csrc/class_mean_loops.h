// SPDX-License-Identifier: MIT
// The loops of the class-mean operators on the CPU; see cpu_isa.h for how this is compiled.
#pragma once

#include "convert_loops.h"
#include "loop_headers.h"

namespace dmfast {
namespace {

// Rounding grows with the length of a chain of additions: sums of short runs are summed in turn.
// The order depends on the sizes alone, so that the result has the same bits on any number of
// threads.
constexpr int64_t kRun = 16;
constexpr int64_t kColumnsAtOnce = 2048;  // their sums fit L1, and rows are read in long stretches

template <typename T>
void class_mean(const T* from, int64_t count, int64_t width, int64_t begin, int64_t end,
                typename Accumulator<T>::type* to) {
  using acc_t = typename Accumulator<T>::type;
  for (int64_t d0 = begin; d0 < end; d0 += kColumnsAtOnce) {
    const int64_t columns = end - d0 < kColumnsAtOnce ? end - d0 : kColumnsAtOnce;
    acc_t total[kColumnsAtOnce] = {};
    for (int64_t first = 0; first < count; first += kRun) {
      const int64_t last = first + kRun < count ? first + kRun : count;
      acc_t run[kColumnsAtOnce] = {};
      for (int64_t row = first; row < last; ++row) {
        const T* values = from + row * width + d0;
        if constexpr (std::is_same_v<T, acc_t>) {
          for (int64_t d = 0; d < columns; ++d) run[d] += values[d];
        } else {
          acc_t wide[kColumnsAtOnce];
          widen(values, columns, wide);
          for (int64_t d = 0; d < columns; ++d) run[d] += wide[d];
        }
      }
      for (int64_t d = 0; d < columns; ++d) total[d] += run[d];
    }
    for (int64_t d = 0; d < columns; ++d) {
      to[d0 + d] = count > 0 ? total[d] / static_cast<acc_t>(count) : acc_t(0);
    }
  }
}

void class_mean_of(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                   int64_t end, void* mean) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    class_mean(static_cast<const T*>(rows), count, width, begin, end,
               static_cast<typename Accumulator<T>::type*>(mean));
  });
}

}  // namespace
}  // namespace dmfast

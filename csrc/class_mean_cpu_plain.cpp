// SPDX-License-Identifier: MIT
// The class means for every machine.
#include "class_mean_isa.h"
#include "class_mean_loops.h"

namespace dmfast {

void class_mean_plain(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                      int64_t end, void* mean) {
  class_mean_of(rows, dtype, count, width, begin, end, mean);
}

}  // namespace dmfast

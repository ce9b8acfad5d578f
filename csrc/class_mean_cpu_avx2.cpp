// SPDX-License-Identifier: MIT
// The class means for AVX2.
#include "class_mean_isa.h"
#include "loop_headers.h"
#if DMFAST_CPU_ISAS
#include "target_avx2.h"
#endif
#include "class_mean_loops.h"

namespace dmfast {

void class_mean_avx2(const void* rows, DType dtype, int64_t count, int64_t width, int64_t begin,
                     int64_t end, void* mean) {
  class_mean_of(rows, dtype, count, width, begin, end, mean);
}

}  // namespace dmfast

// SPDX-License-Identifier: MIT
#include "augment_cpu.h"

#include <algorithm>

#include "augment.h"
#include "augment_isa.h"
#include "cpu_isa.h"

namespace dmfast {
namespace {

const AugmentLoops& loops() {
  static const AugmentLoops& chosen =
      for_this_cpu(&augment_loops_plain, &augment_loops_avx2, &augment_loops_avx512)();
  return chosen;
}

}  // namespace

const float* Rows::of(int64_t image) const {
  const int64_t group = offsets
                            ? std::upper_bound(offsets + 1, offsets + groups, image) - offsets - 1
                            : image / (images / groups);
  return params + group * kColumns;
}

void siamese_augment_range(const Images& x, const Images& y, ImageSize size, const Rows& rows,
                           int64_t begin, int64_t end) {
  const auto map = x.dtype == DType::kFloat64 ? loops().map_double : loops().map_float;
  map(x, y, size, rows, false, begin, end);
}

void siamese_augment_backward_range(const Images& y_gradient, const Images& x_gradient,
                                    ImageSize size, const Rows& rows, int64_t begin, int64_t end) {
  const auto map = y_gradient.dtype == DType::kFloat64 ? loops().map_double : loops().map_float;
  map(y_gradient, x_gradient, size, rows, true, begin, end);
}

void gather_augment_range(const Images& images, const int64_t* index,
                          const Normalisation& normalisation, const Images& y, ImageSize size,
                          const Rows& rows, int64_t begin, int64_t end) {
  const auto gather = y.dtype == DType::kFloat64 ? loops().gather_double : loops().gather_float;
  gather(images, index, normalisation, y, size, rows, begin, end);
}

}  // namespace dmfast

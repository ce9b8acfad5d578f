// SPDX-License-Identifier: MIT
// The loops of augment_loops.h by the instructions that they are compiled for.
#pragma once

#include <cstdint>

#include "images.h"

namespace dmfast {

struct AugmentLoops {
  using Map = void (*)(const Images& x, const Images& y, ImageSize size, const Rows& rows,
                       bool adjoint, int64_t begin, int64_t end);
  using Gather = void (*)(const Images& images, const int64_t* index,
                          const Normalisation& normalisation, const Images& y, ImageSize size,
                          const Rows& rows, int64_t begin, int64_t end);
  Map map_float, map_double;  // by the accumulation type
  Gather gather_float, gather_double;
};

const AugmentLoops& augment_loops_plain();
const AugmentLoops& augment_loops_avx2();
const AugmentLoops& augment_loops_avx512();

}  // namespace dmfast

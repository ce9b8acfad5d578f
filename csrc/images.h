// SPDX-License-Identifier: MIT
// Batches of images and their rows of parameters, as the loops and the kernels of the augmentation
// operators take them: raw pointers.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dmfast {

// A batch of images wherever it lies: element (n, c, y, x) is data[n sn + c sc + y sy + x sx].
struct Images {
  void* data;
  DType dtype;
  int64_t sn, sc, sy, sx;  // strides in elements
};

struct ImageSize {
  int64_t channels, height, width;
};

// How the rows of the table are spread over the images.
struct Rows {
  const float* params;     // [groups, kColumns]
  const int64_t* offsets;  // [groups + 1], or null: evenly
  int64_t groups, images;

  const float* of(int64_t image) const;  // on the CPU, where the offsets were checked
};

// For bytes, lookup[c * 256 + v] is the normalised value (on the CPU; null on a GPU, whose kernels
// make their own); for float32, (v - mean[c]) / std[c] is.
struct Normalisation {
  const float* lookup;
  const float* mean;
  const float* std;
};

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// The loops of the augmentation operators on the CPU, over raw pointers.
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

  const float* of(int64_t image) const;
};

// Augments images begin <= n < end of x into y (of the same dtype).
void siamese_augment_range(const Images& x, const Images& y, ImageSize size, const Rows& rows,
                           int64_t begin, int64_t end);

// The adjoint: gradients of y become gradients of x.
void siamese_augment_backward_range(const Images& y_gradient, const Images& x_gradient,
                                    ImageSize size, const Rows& rows, int64_t begin, int64_t end);

// Picks images[index[n]], normalises and augments it into y[n]. For bytes, lookup[c * 256 + v] is
// the normalised value; for float32, (v - mean[c]) / std[c] is.
struct Normalisation {
  const float* lookup;
  const float* mean;
  const float* std;
};

void gather_augment_range(const Images& images, const int64_t* index,
                          const Normalisation& normalisation, const Images& y, ImageSize size,
                          const Rows& rows, int64_t begin, int64_t end);

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// The loops of the augmentation operators on the CPU, over raw pointers.
#pragma once

#include <cstdint>

#include "images.h"

namespace dmfast {

// Augments images begin <= n < end of x into y (of the same dtype).
void siamese_augment_range(const Images& x, const Images& y, ImageSize size, const Rows& rows,
                           int64_t begin, int64_t end);

// The adjoint: gradients of y become gradients of x.
void siamese_augment_backward_range(const Images& y_gradient, const Images& x_gradient,
                                    ImageSize size, const Rows& rows, int64_t begin, int64_t end);

// Picks images[index[n]], normalises and augments it into y[n].
void gather_augment_range(const Images& images, const int64_t* index,
                          const Normalisation& normalisation, const Images& y, ImageSize size,
                          const Rows& rows, int64_t begin, int64_t end);

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// The kernels of the augmentation operators, over raw pointers to the device's memory. Each launch
// gives a CUDA error code, 0 for none; nothing is allocated or waited for. Where offsets leave an
// image in no group it is zero; where its row of parameters holds NaN it is NaN.
#pragma once

#include <cstdint>

#include "images.h"

namespace dmfast {

// How many float64 of workspace (`sums`) an image takes: none where one block takes all of it.
int64_t augment_workspace(ImageSize size);

int siamese_augment_launch(const Images& x, const Images& y, ImageSize size, const Rows& rows,
                           double* sums, void* stream);

int siamese_augment_backward_launch(const Images& y_gradient, const Images& x_gradient,
                                    ImageSize size, const Rows& rows, double* sums, void* stream);

// An index is clamped to the `count` images that there are, at least one.
int gather_augment_launch(const Images& images, int64_t count, const int64_t* index,
                          const Normalisation& normalisation, const Images& y, ImageSize size,
                          const Rows& rows, double* sums, void* stream);

}  // namespace dmfast

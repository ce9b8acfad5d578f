// SPDX-License-Identifier: MIT
// The kernels of the class-mean operators, over raw pointers to the device's memory. Each launch
// gives a CUDA error code, 0 for none. Sums are taken in an order that depends on the sizes alone.
#pragma once

#include <cstdint>

#include "clamped_groups.h"
#include "dtype.h"

namespace dmfast {

// Rows of embeddings, each contiguous.
struct Embeddings {
  const void* data;
  DType dtype;
  int64_t stride;  // from row to row, in elements
  ClampedGroups groups;
};

// The mean of each group to means [groups, width], float64 with `doubles` and float32 otherwise. A
// group without rows has mean 0.
int class_mean_launch(const Embeddings& rows, int64_t width, bool doubles, void* means,
                      void* stream);

// How many elements of workspace (`sums`) the discrepancy takes.
int64_t class_mean_workspace(int64_t groups, int64_t width);

// difference [groups, width], which holds the means of real, becomes their distance from those of
// syn, and loss the sum of its squares. A group with rows on one side only makes both NaN.
int class_mean_discrepancy_launch(const ClampedGroups& real_groups, const Embeddings& syn,
                                  int64_t width, bool doubles, void* difference, void* loss,
                                  void* sums, void* stream);

// mean_gradient [groups, width] in the accumulation type of dtype to the gradient of each row,
// [rows, width] in dtype; rows in no group get 0.
int class_mean_backward_launch(const void* mean_gradient, DType dtype, const ClampedGroups& groups,
                               int64_t width, void* rows, void* stream);

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// A call of instance_norm_relu_pool over raw pointers, which lie where its loops or kernels run.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dmfast {

// Images [images, channels, height, width], in planes (NCHW) or, channels_last, in pixels.
struct NormPoolSize {
  int64_t images, channels, height, width;
  int64_t networks;  // the images are split evenly over the networks
  bool channels_last;

  int64_t pixels() const { return height * width; }
  int64_t pooled() const { return (height / 2) * (width / 2); }
};

// All but x, out and their gradients are in the accumulation type.
struct NormPool {
  NormPoolSize size;
  DType dtype;         // of x, out and their gradients
  const void* weight;  // [networks, channels], or null: 1
  const void* bias;    // [networks, channels], or null: 0
  void* statistics;    // [images, 2, channels]: mean, 1 / sqrt(variance + eps)
};

}  // namespace dmfast

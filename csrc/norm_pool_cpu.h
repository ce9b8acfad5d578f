// SPDX-License-Identifier: MIT
// The loops of instance_norm_relu_pool on the CPU, over raw pointers.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dmfast {

// Images [images, channels, height, width], in planes (NCHW) or, channels_last, in pixels. Work is
// split into tasks: a plane, or a run of the channels of an image.
struct NormPoolSize {
  int64_t images, channels, height, width;
  int64_t networks;  // the images are split evenly over the networks
  bool channels_last;

  int64_t pixels() const { return height * width; }
  int64_t pooled() const { return (height / 2) * (width / 2); }
  int64_t tasks() const;
  int64_t elements_of_a_task() const;
};

// All but x, out and their gradients are in the accumulation type.
struct NormPool {
  NormPoolSize size;
  DType dtype;         // of x, out and their gradients
  const void* weight;  // [networks, channels], or null: 1
  const void* bias;    // [networks, channels], or null: 0
  void* statistics;    // [images, 2, channels]: mean, 1 / sqrt(variance + eps)
};

// Tasks begin <= t < end: x to out, and the statistics.
void norm_pool_range(const NormPool& call, const void* x, double eps, void* out, int64_t begin,
                     int64_t end);

// Tasks begin <= t < end: the gradient of out to that of x (null: not wanted), and to sums
// [images, 2, channels]: what each image adds to the gradients of weight and bias.
void norm_pool_backward_range(const NormPool& call, const void* gradient, const void* x,
                              void* x_gradient, void* sums, int64_t begin, int64_t end);

// The sums of images to the gradient [networks, channels] of the weight (which = 0) or the bias
// (which = 1), in a fixed order.
void norm_pool_parameter_gradient(const NormPool& call, const void* sums, int which, void* to);

}  // namespace dmfast

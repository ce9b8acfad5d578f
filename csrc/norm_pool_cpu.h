// SPDX-License-Identifier: MIT
// The loops of instance_norm_relu_pool on the CPU, over raw pointers.
#pragma once

#include <cstdint>

#include "norm_pool_call.h"

namespace dmfast {

// Work is split into tasks: a plane, or a run of the channels of an image.
int64_t norm_pool_tasks(const NormPoolSize& size);
int64_t norm_pool_elements_of_a_task(const NormPoolSize& size);

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

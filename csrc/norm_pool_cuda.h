// SPDX-License-Identifier: MIT
// The kernels of instance_norm_relu_pool, over raw pointers to the device's memory. Each launch
// gives a CUDA error code, 0 for none. Sums are taken in an order that depends on the sizes alone.
#pragma once

#include "norm_pool_call.h"

namespace dmfast {

// Sides of images are below it: the kernels number rows and columns in 32 bits.
constexpr int64_t kNormPoolLargestSide = int64_t{1} << 30;

// x to out, and the statistics.
int norm_pool_launch(const NormPool& call, const void* x, double eps, void* out, void* stream);

// The gradient of out to that of x (null: not wanted), and to sums [images, 2, channels]: what each
// image adds to the gradients of weight and bias.
int norm_pool_backward_launch(const NormPool& call, const void* gradient, const void* x,
                              void* x_gradient, void* sums, void* stream);

// The sums of images to the gradients [networks, channels] of weight and bias (null: not wanted).
int norm_pool_parameter_gradient_launch(const NormPool& call, const void* sums, void* of_weight,
                                        void* of_bias, void* stream);

}  // namespace dmfast

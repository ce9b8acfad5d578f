// SPDX-License-Identifier: MIT
// Instance norm, ReLU and 2x2 mean pooling, per element: host and device. A plane is one channel of
// one image; acc_t is float, or double for doubles.
#pragma once

#include "host_device.h"

namespace dmfast {

// y = (z - mean) rstd weight + bias. The mean is taken off first: z rstd weight would cancel where
// the mean is large.
template <typename acc_t>
struct PlaneNorm {
  acc_t mean, rstd, weight, bias;

  DMFAST_HD acc_t normalised(acc_t z) const { return (z - mean) * rstd; }
  DMFAST_HD acc_t operator()(acc_t z) const { return normalised(z) * weight + bias; }
};

// Comparisons as torch's: NaN passes, and so does its gradient.
template <typename acc_t>
DMFAST_HD acc_t relu(acc_t y) {
  return y <= acc_t(0) ? acc_t(0) : y;
}

template <typename acc_t>
DMFAST_HD acc_t relu_gradient(acc_t y, acc_t gradient) {
  return y <= acc_t(0) ? acc_t(0) : gradient;
}

// Mean and variance from sums of deviations from a first estimate of the mean, which takes out most
// of what the estimate's rounding left.
template <typename acc_t>
struct Moments {
  acc_t mean, variance;

  DMFAST_HD Moments(acc_t estimate, acc_t deviations, acc_t squares, acc_t count) {
    const acc_t rest = deviations / count;
    mean = estimate + rest;
    variance = squares / count - rest * rest;
    if (variance < acc_t(0)) variance = acc_t(0);
  }
};

// The gradient of z from that of y, and from the means over the plane of y's gradient and of its
// product with the normalised z.
template <typename acc_t>
DMFAST_HD acc_t norm_gradient(const PlaneNorm<acc_t>& norm, acc_t z, acc_t gradient,
                              acc_t gradient_mean, acc_t product_mean) {
  return norm.rstd * norm.weight * (gradient - gradient_mean - norm.normalised(z) * product_mean);
}

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// Instance norm, ReLU and 2x2 mean pooling of one image on vectors of channels, and their adjoint.
// As winograd_simd.h, for one source of each instruction set.
#pragma once

#include "winograd_simd.h"

namespace dmfast {
namespace {

// Pixels of an image, `pixel` elements apart; rows follow one another.
template <typename T>
struct Plane {
  T* data;
  int64_t width, pixel;

  T* at(int64_t y, int64_t x) const { return data + (y * width + x) * pixel; }
};

struct Statistics {
  Vector mean, deviation;  // the latter is 1 / sqrt(variance + eps)

  // From the sum of all values: the variance is that of what they are beside the mean, so that it
  // drowns neither in the mean nor in a pixel that stands out. Rows are summed by themselves.
  static DMFAST_INLINE Statistics of(const Plane<const float>& values, int64_t height, Vector sum,
                                     float eps) {
    const float share = 1.0f / static_cast<float>(height * values.width);
    const Vector mean = sum * share;
    Vector rest{}, squares{};
    for (int64_t y = 0; y < height; ++y) {
      Vector row_rest{}, row_squares{};
      for (int64_t x = 0; x < values.width; ++x) {
        const Vector difference = load(values.at(y, x)) - mean;
        row_rest += difference;
        row_squares += difference * difference;
      }
      rest += row_rest;
      squares += row_squares;
    }
    rest *= share;  // what rounding left of the mean
    const Vector variance = squares * share - rest * rest;
    float lanes[kLanes];
    store(lanes, relu(variance) + eps);
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = 1.0f / __builtin_sqrtf(lanes[i]);
    return {mean + rest, load(lanes)};
  }

  static DMFAST_INLINE Statistics read(const float* from, int64_t filters) {
    return {load(from), load(from + filters)};
  }

  DMFAST_INLINE void write(float* to, int64_t filters) const {
    store(to, mean);
    store(to + filters, deviation);
  }
};

// What is left of the norm: value * factor + term.
struct Scaling {
  Vector weight, factor, term;

  DMFAST_INLINE Scaling(const Statistics& statistics, const InstanceNorm& norm, int64_t filter)
      : weight(norm.weight ? load(norm.weight + filter) : splat(1.0f)) {
    const Vector bias = norm.bias ? load(norm.bias + filter) : Vector{};
    factor = statistics.deviation * weight;
    term = bias - statistics.mean * factor;
  }

  DMFAST_INLINE Vector operator()(const float* value) const { return load(value) * factor + term; }
};

DMFAST_INLINE void normalise_and_pool(const ConvBlock& block, const Plane<const float>& z,
                                      const Scaling& scaling, const Plane<float>& out) {
  for (int64_t y = 0; y < block.out_height(); ++y) {
    for (int64_t x = 0; x < block.out_width(); ++x) {
      const float* first = z.at(2 * y, 2 * x);
      const float* second = z.at(2 * y + 1, 2 * x);
      const Vector upper = relu(scaling(first)) + relu(scaling(first + z.pixel));
      const Vector lower = relu(scaling(second)) + relu(scaling(second + z.pixel));
      store(out.at(y, x), (upper + lower) * 0.25f);
    }
  }
}

// The gradient of z from that of the pooled output; it may be written over z. norm_gradients takes
// those of the norm's weight and bias.
DMFAST_INLINE void normalise_and_pool_adjoint(const ConvBlock& block, const Plane<const float>& z,
                                              const Statistics& statistics, const Scaling& scaling,
                                              const Plane<const float>& gradient,
                                              const Plane<float>& z_gradient, float* norm_gradients,
                                              int64_t filters) {
  Vector of_weight{}, of_bias{};
  for (int64_t y = 0; y < block.out_height(); ++y) {
    Vector row_weight{}, row_bias{};
    for (int64_t x = 0; x < block.out_width(); ++x) {
      const Vector shared = load(gradient.at(y, x)) * 0.25f;
      for (int64_t i = 0; i < 4; ++i) {
        const float* value = z.at(2 * y + i / 2, 2 * x + i % 2);
        const Vector passed = scaling(value) <= 0.0f ? Vector{} : shared;
        row_bias += passed;
        row_weight += passed * ((load(value) - statistics.mean) * statistics.deviation);
      }
    }
    of_weight += row_weight;
    of_bias += row_bias;
  }
  store(norm_gradients, of_weight);
  store(norm_gradients + filters, of_bias);
  const int64_t pixels = block.conv_height() * block.conv_width();
  const float share = 1.0f / static_cast<float>(pixels);
  const Vector mean_bias = of_bias * share, mean_weight = of_weight * share;
  const auto put = [&](int64_t y, int64_t x, Vector shared) {
    const float* value = z.at(y, x);
    const Vector passed = scaling(value) <= 0.0f ? Vector{} : shared;
    const Vector normal = (load(value) - statistics.mean) * statistics.deviation;
    store(z_gradient.at(y, x), (passed - mean_bias - normal * mean_weight) * scaling.factor);
  };
  const int64_t pooled_rows = 2 * block.out_height(), pooled_columns = 2 * block.out_width();
  for (int64_t y = 0; y < block.conv_height(); ++y) {
    for (int64_t x = 0; x < block.conv_width(); ++x) {
      // Odd sides have a last row or column that is not pooled, but part of the statistics.
      const bool pooled = y < pooled_rows && x < pooled_columns;
      put(y, x, pooled ? load(gradient.at(y / 2, x / 2)) * 0.25f : Vector{});
    }
  }
}

}  // namespace
}  // namespace dmfast

// SPDX-License-Identifier: MIT
// Norm, ReLU and 2x2 mean pooling of one image on vectors of channels, and their adjoint.
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

  DMFAST_INLINE Scaling(const Statistics& statistics, const Norm& norm, int64_t filter)
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

// The gradients of a norm's weight and bias.
struct NormGradient {
  Vector weight, bias;

  static DMFAST_INLINE NormGradient read(const float* from, int64_t filters) {
    return {load(from), load(from + filters)};
  }

  DMFAST_INLINE void write(float* to, int64_t filters) const {
    store(to, weight);
    store(to + filters, bias);
  }

  DMFAST_INLINE NormGradient operator*(float factor) const {
    return {weight * factor, bias * factor};
  }
};

// That of one image, from the gradient of the pooled output.
DMFAST_INLINE NormGradient norm_gradient(const ConvBlock& block, const Plane<const float>& z,
                                         const Statistics& statistics, const Scaling& scaling,
                                         const Plane<const float>& gradient) {
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
  return {of_weight, of_bias};
}

// The gradient of z from that of the pooled output; it may be written over z. `share` is what the
// norm's gradients come to a pixel.
DMFAST_INLINE void normalise_and_pool_adjoint(const ConvBlock& block, const Plane<const float>& z,
                                              const Statistics& statistics, const Scaling& scaling,
                                              const Plane<const float>& gradient,
                                              const NormGradient& share,
                                              const Plane<float>& z_gradient) {
  const auto put = [&](int64_t y, int64_t x, Vector shared) {
    const float* value = z.at(y, x);
    const Vector passed = scaling(value) <= 0.0f ? Vector{} : shared;
    const Vector normal = (load(value) - statistics.mean) * statistics.deviation;
    store(z_gradient.at(y, x), (passed - share.bias - normal * share.weight) * scaling.factor);
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

// One image's part of a block's backward that comes before the convolution's, a vector of filters
// from k on: the norm's gradients, where they are not there, and that of z, where it is wanted.
struct NormBackward {
  const ConvBlock& block;
  const Norm& norm;
  const BlockGradient& gradient;
  float* z_gradient;  // [conv_size] or null

  DMFAST_INLINE void operator()(const Plane<const float>& z, int64_t image, int64_t k) const {
    const int64_t filters = block.filters;
    const Statistics statistics = Statistics::read(
        norm.given ? norm.given + k : gradient.statistics + image * 2 * filters + k, filters);
    const Scaling scaling(statistics, norm, k);
    const Plane<const float> upstream{gradient.gradient + image * block.out_size() + k,
                                      block.out_width(), filters};
    NormGradient share{};
    if (gradient.shares) {
      share = NormGradient::read(gradient.shares + k, filters);
    } else {
      const NormGradient found = norm_gradient(block, z, statistics, scaling, upstream);
      found.write(gradient.norm_gradients + image * 2 * filters + k, filters);
      share = found * (1.0f / static_cast<float>(block.conv_height() * block.conv_width()));
    }
    if (!z_gradient) return;
    normalise_and_pool_adjoint(block, z, statistics, scaling, upstream, share,
                               {z_gradient + k, block.conv_width(), filters});
  }
};

}  // namespace
}  // namespace dmfast

// SPDX-License-Identifier: MIT
// Calls the CPU's block kernels of one instruction set (-DDMFAST_SET=...) on random shapes, with
// every buffer exactly as large as the kernels say: for the sanitizers, which torch's allocator
// would hide the bounds from. Forward and gradients are compared with plain loops besides.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "conv_block.h"

namespace {

using dmfast::BlockGradient;
using dmfast::BlockInput;
using dmfast::ConvBlock;
using dmfast::Norm;

const dmfast::ConvBlockKernels& kernels = dmfast::DMFAST_SET::kernels;
constexpr float kEps = 1e-5f;

// Memory of its own for each buffer, aligned as the operators' is.
class Bytes {
 public:
  explicit Bytes(int64_t count) : memory_(std::aligned_alloc(64, (count + 63) / 64 * 64)) {
    std::memset(memory_.get(), 0, (count + 63) / 64 * 64);
  }
  void* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct Random {
  std::mt19937_64 engine;
  int64_t from(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  }
  Floats normal(int64_t count) {
    std::normal_distribution<float> distribution;
    Floats values(count);
    for (float& value : values) value = distribution(engine);
    return values;
  }
};

ConvBlock random_block(Random& random) {
  for (;;) {
    const bool thin = random.from(0, 1);
    // More than 256 tiles are summed in another way.
    const int64_t largest = random.from(0, 15) ? 21 : 70, smallest = largest > 21 ? 62 : 1;
    const ConvBlock block{thin ? random.from(1, 4) : 16 * random.from(1, 3),
                          16 * random.from(1, 3),
                          random.from(smallest, largest),
                          random.from(smallest, largest),
                          random.from(0, 9) ? random.from(0, 3) : random.from(4, 8),
                          random.from(0, 1) == 1};
    if (block.conv_height() >= 2 && block.conv_width() >= 2) return block;
  }
}

// What a block computes, by plain loops in double; images are [height, width, channels].
struct Plain {
  const ConvBlock& block;
  const Floats &x, &weights, &scale, &shift;

  template <typename Use>  // use(output pixel, input pixel, tap) for those within the image
  void over_taps(const Use& use) const {
    for (int64_t i = 0; i < block.conv_height(); ++i) {
      for (int64_t j = 0; j < block.conv_width(); ++j) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t y = i + tap / 3 - block.padding, x = j + tap % 3 - block.padding;
          if (y < 0 || x < 0 || y >= block.height || x >= block.width) continue;
          use(i * block.conv_width() + j, y * block.width + x, tap);
        }
      }
    }
  }
  double weight(int64_t k, int64_t c, int64_t tap) const {
    return weights[(k * block.channels + c) * 9 + tap];
  }

  // Of one image: out [pixels, filters], and where gradient [pixels, filters] is given, those of x
  // and of the weights, to which they are added.
  Doubles run(int64_t image, const float* gradient, double* x_gradient, Doubles* of_weights) const {
    const int64_t channels = block.channels, filters = block.filters;
    const int64_t pixels = block.conv_height() * block.conv_width();
    const float* of_image = x.data() + image * block.input_size();
    Doubles z(pixels * filters), dz(pixels * filters), out(block.out_size());
    over_taps([&](int64_t to, int64_t from, int64_t tap) {
      for (int64_t k = 0; k < filters; ++k) {
        for (int64_t c = 0; c < channels; ++c) {
          z[to * filters + k] += of_image[from * channels + c] * weight(k, c, tap);
        }
      }
    });
    for (int64_t k = 0; k < filters; ++k) {
      double mean = 0, variance = 0;
      for (int64_t p = 0; p < pixels; ++p) mean += z[p * filters + k] / pixels;
      for (int64_t p = 0; p < pixels; ++p) {
        variance += std::pow(z[p * filters + k] - mean, 2) / pixels;
      }
      const double rstd = 1 / std::sqrt(variance + kEps);
      double sum = 0, product = 0;
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t i = p / block.conv_width() / 2, j = p % block.conv_width() / 2;
        const double normal = (z[p * filters + k] - mean) * rstd;
        const double y = normal * scale[k] + shift[k];
        if (i >= block.out_height() || j >= block.out_width() || y <= 0) continue;
        const int64_t at = (i * block.out_width() + j) * filters + k;
        out[at] += y / 4;
        if (!gradient) continue;
        dz[p * filters + k] = gradient[at] / 4 * scale[k];
        sum += dz[p * filters + k] / pixels;
        product += dz[p * filters + k] * normal / pixels;
      }
      for (int64_t p = 0; gradient && p < pixels; ++p) {
        const double normal = (z[p * filters + k] - mean) * rstd;
        dz[p * filters + k] = rstd * (dz[p * filters + k] - sum - normal * product);
      }
    }
    if (gradient) {
      over_taps([&](int64_t to, int64_t from, int64_t tap) {
        for (int64_t k = 0; k < filters; ++k) {
          for (int64_t c = 0; c < channels; ++c) {
            x_gradient[from * channels + c] += dz[to * filters + k] * weight(k, c, tap);
            (*of_weights)[(k * channels + c) * 9 + tap] +=
                dz[to * filters + k] * of_image[from * channels + c];
          }
        }
      });
    }
    return out;
  }
};

// The root of the mean squared difference over that of the values.
double distance(const float* found, const double* wanted, int64_t count) {
  double difference = 0, squares = 1e-30;
  for (int64_t i = 0; i < count; ++i) {
    difference += std::pow(found[i] - wanted[i], 2);
    squares += std::pow(wanted[i], 2);
  }
  return std::sqrt(difference / squares);
}

// Of one image: by statistics that are given, with the gradients of the norm known or asked for
// alone, everything is as by its own.
void check_given(const ConvBlock& block, const Norm& own, const BlockInput& x, const void* packed,
                 const void* turned, const BlockGradient& gradient, const float* out) {
  const int64_t filters = block.filters;
  const Norm norm{own.weight, own.bias, own.eps, gradient.statistics};
  const Bytes workspace(kernels.workspace_bytes(block, false));
  const Bytes backward_workspace(kernels.workspace_bytes(block, true));
  const auto same = [](const char* what, const float* a, const float* b, int64_t count) {
    if (std::equal(a, a + count, b)) return;
    std::printf("given statistics: another %s\n", what);
    std::exit(1);
  };
  Floats again(block.out_size());
  kernels.forward(block, packed, norm, x, 1, again.data(), nullptr, nullptr, workspace.get());
  same("result", again.data(), out, block.out_size());
  if (!block.thin()) {
    std::fill(again.begin(), again.end(), 0.0f);
    kernels.pool(block, norm, gradient.z, 1, again.data());
    same("result of z", again.data(), out, block.out_size());
  }
  Floats norm_gradients(2 * filters), shares(2 * filters), x_gradient(block.input_size());
  BlockGradient part{};
  part.x = x;
  part.z = gradient.z;
  part.gradient = gradient.gradient;
  part.norm_gradients = norm_gradients.data();
  kernels.norm_backward(block, packed, norm, part, 1, backward_workspace.get());
  same("gradient of the norm", norm_gradients.data(), gradient.norm_gradients, 2 * filters);
  const float share = 1.0f / static_cast<float>(block.conv_height() * block.conv_width());
  for (int64_t k = 0; k < 2 * filters; ++k) shares[k] = norm_gradients[k] * share;
  part.norm_gradients = nullptr;
  part.shares = shares.data();
  part.x_gradient = x_gradient.data();
  kernels.backward(block, packed, turned, norm, part, 1, backward_workspace.get());
  same("gradient", x_gradient.data(), gradient.x_gradient, block.input_size());
}

void run(Random& random) {
  const ConvBlock block = random_block(random);
  const int64_t images = random.from(1, 5), filters = block.filters, channels = block.channels;
  const Floats x = random.normal(images * block.input_size());
  const Floats weights = random.normal(filters * channels * 9);
  const Floats scale = random.normal(filters), shift = random.normal(filters);
  const Floats gradient = random.normal(images * block.out_size());
  const Norm norm{scale.data(), shift.data(), kEps, nullptr};
  const BlockInput input{x.data(), block.input_size(), 1, block.width * channels, channels};

  const Bytes packed(kernels.packed_bytes(block)), turned(kernels.packed_bytes(block));
  kernels.pack(block, weights.data(), false, packed.get());
  kernels.pack(block, weights.data(), true, turned.get());
  const Bytes workspace(kernels.workspace_bytes(block, false));
  const Bytes backward_workspace(kernels.workspace_bytes(block, true));
  Floats out(images * block.out_size()), z(block.thin() ? 0 : images * block.conv_size());
  Floats statistics(images * 2 * filters), x_gradient(images * block.input_size());
  const int64_t at_once = kernels.images_at_once(block);
  for (int64_t first = 0; first < images; first += at_once) {
    BlockInput part = input;
    part.data += first * input.sn;
    kernels.forward(block, packed.get(), norm, part, std::min(at_once, images - first),
                    out.data() + first * block.out_size(),
                    block.thin() ? nullptr : z.data() + first * block.conv_size(),
                    statistics.data() + first * 2 * filters, workspace.get());
  }

  const int64_t at_a_time = std::max<int64_t>(
      1, std::min(kernels.images_at_once(block.adjoint()), block.gradient_tiles() / block.tiles()));
  const Bytes inputs(block.thin() ? 0 : kernels.transforms_bytes(block, true));
  const Bytes outputs(block.thin() ? 0 : kernels.transforms_bytes(block, false));
  Floats norm_gradients(images * 2 * filters), sums(36 * channels * filters);
  Floats partials(block.thin() ? images * 9 * channels * filters : 0);
  Floats weight_gradient(filters * channels * 9);
  for (int64_t first = 0; first < images; first += at_a_time) {
    const int64_t now = std::min(at_a_time, images - first);
    BlockGradient part{};
    part.x = input;
    part.x.data += first * input.sn;
    part.statistics = statistics.data() + first * 2 * filters;
    part.gradient = gradient.data() + first * block.out_size();
    part.x_gradient = x_gradient.data() + first * block.input_size();
    part.norm_gradients = norm_gradients.data() + first * 2 * filters;
    if (block.thin()) {
      part.weight_partials = partials.data() + first * 9 * channels * filters;
    } else {
      part.z = z.data() + first * block.conv_size();
      part.inputs = inputs.get();
      part.outputs = outputs.get();
    }
    kernels.backward(block, packed.get(), turned.get(), norm, part, now, backward_workspace.get());
    for (int64_t point = 0; !block.thin() && point < dmfast::kPoints; ++point) {
      kernels.weight_gradient(block, inputs.get(), outputs.get(), point, now * block.tiles(),
                              sums.data() + point * channels * filters, backward_workspace.get());
    }
  }
  BlockGradient first_image{};
  first_image.z = block.thin() ? nullptr : z.data();
  first_image.statistics = statistics.data();
  first_image.gradient = gradient.data();
  first_image.x_gradient = x_gradient.data();
  first_image.norm_gradients = norm_gradients.data();
  check_given(block, norm, input, packed.get(), turned.get(), first_image, out.data());
  for (int64_t first = 0; !block.thin() && first < filters; first += dmfast::kChannelStep) {
    kernels.weight_gradient_out(block, sums.data(), first, first + dmfast::kChannelStep,
                                weight_gradient.data());
  }
  for (int64_t image = 0; block.thin() && image < images; ++image) {
    for (int64_t row = 0; row < 9 * channels; ++row) {
      for (int64_t k = 0; k < filters; ++k) {
        weight_gradient[(k * channels + row % channels) * 9 + row / channels] +=
            partials[(image * 9 * channels + row) * filters + k];
      }
    }
  }

  const Plain plain{block, x, weights, scale, shift};
  Doubles of_weights(filters * channels * 9);
  double worst[2] = {0, 0};
  for (int64_t image = 0; image < images; ++image) {
    Doubles of_x(block.input_size());
    const Doubles wanted =
        plain.run(image, gradient.data() + image * block.out_size(), of_x.data(), &of_weights);
    worst[0] = std::max(
        worst[0], distance(out.data() + image * block.out_size(), wanted.data(), block.out_size()));
    worst[1] = std::max(worst[1], distance(x_gradient.data() + image * block.input_size(),
                                           of_x.data(), block.input_size()));
  }
  worst[1] = std::max(worst[1],
                      distance(weight_gradient.data(), of_weights.data(), filters * channels * 9));
  // A ReLU that falls on the other side of zero counts in the gradients; few pixels, and a variance
  // near zero, raise what rounding does. A wrong index gives an error near 1.
  const double most = block.bfloat16 ? 0.3 : 0.05;
  if (worst[0] < most && worst[1] < most) return;
  std::printf(
      "%lld images %lldx%lldx%lld to %lld, padding %lld, bfloat16 %d: %g forward, %g back\n",
      static_cast<long long>(images), static_cast<long long>(channels),
      static_cast<long long>(block.height), static_cast<long long>(block.width),
      static_cast<long long>(filters), static_cast<long long>(block.padding), block.bfloat16,
      worst[0], worst[1]);
  std::exit(1);
}

}  // namespace

int main(int, char** arguments) {
  for (int64_t seed = 0; seed < std::atoll(arguments[1]); ++seed) {
    Random random{std::mt19937_64(seed)};
    run(random);
  }
  return 0;
}

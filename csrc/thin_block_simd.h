// SPDX-License-Identifier: MIT
// The first block of a network, of 1 to 4 channels. As winograd_simd.h, for one source of each
// instruction set.
//
// A product with so few channels is little work beside the transforms, so that tiles are multiplied
// and taken out of the domain in registers, a vector of filters at a time. An image's plane of
// these filters fits the cache; the gradient makes it anew rather than reading it from memory.
#pragma once

#include "conv_block_simd.h"

namespace dmfast {
namespace {

struct ThinScratch {
  float* padded;    // [4 tile rows + 2][4 tile columns + 2, channels]
  float* patches;   // [36][row_size]: those of a row of tiles
  float* inputs;    // [tile rows][36][row_size]: tiles of a row and their channels side by side
  float* conv;      // [conv, kLanes]
  float* gradient;  // [conv_size] and
  float* zeros;     // [filters], in the backward only
  int64_t row_size, bytes;

  ThinScratch(const ConvBlock& block, bool backward, void* memory) {
    Arena arena(memory);
    row_size = round_up(block.tile_columns() * block.channels, kLanes);
    padded = arena.take<float>((4 * block.tile_rows() + 2) * padded_row(block));
    patches = arena.take<float>(kPoints * row_size);
    inputs = arena.take<float>(block.tile_rows() * kPoints * row_size);
    conv = arena.take<float>(block.conv_height() * block.conv_width() * kLanes);
    gradient = arena.take<float>(backward ? block.conv_size() : 0);
    zeros = arena.take<float>(backward ? block.filters : 0);
    bytes = arena.used();
  }

  static int64_t padded_row(const ConvBlock& block) {
    return (4 * block.tile_columns() + 2) * block.channels;
  }
};

// An image into scratch.padded and, in the domain, into scratch.inputs.
template <int kChannels>
void take_in(const ConvBlock& block, const BlockInput& x, int64_t image,
             const ThinScratch& scratch) {
  const int64_t row = ThinScratch::padded_row(block), columns = block.tile_columns();
  __builtin_memset(scratch.padded, 0, sizeof(float) * (4 * block.tile_rows() + 2) * row);
  const float* from = x.data + image * x.sn;
  const bool dense = x.sc == 1 && x.sx == kChannels;
  for (int64_t i = 0; i < block.height; ++i) {
    float* to = scratch.padded + (i + block.padding) * row + block.padding * kChannels;
    if (dense) {
      __builtin_memcpy(to, from + i * x.sy, sizeof(float) * block.width * kChannels);
      continue;
    }
    for (int64_t j = 0; j < block.width; ++j) {
      for (int c = 0; c < kChannels; ++c) {
        to[j * kChannels + c] = from[i * x.sy + j * x.sx + c * x.sc];
      }
    }
  }
  __builtin_memset(scratch.patches, 0, sizeof(float) * kPoints * scratch.row_size);
  for (int64_t tile_row = 0; tile_row < block.tile_rows(); ++tile_row) {
    for (int64_t i = 0; i < 6; ++i) {
      const float* source = scratch.padded + (tile_row * 4 + i) * row;
      for (int64_t j = 0; j < 6; ++j, source += kChannels) {
        float* patch = scratch.patches + (i * 6 + j) * scratch.row_size;
        for (int64_t t = 0; t < columns; ++t) {
          __builtin_memcpy(patch + t * kChannels, source + t * 4 * kChannels,
                           sizeof(float) * kChannels);
        }
      }
    }
    float* to = scratch.inputs + tile_row * kPoints * scratch.row_size;
    for (int64_t e = 0; e < columns * kChannels; e += kLanes) {
      in_both_dimensions<6, 6, Vector>(
          [](const Vector* d, Vector* out) { into_domain(d, out); },
          [&](int i, int j) { return load(scratch.patches + (i * 6 + j) * scratch.row_size + e); },
          [&](int i, int j, Vector value) {
            store(to + (i * 6 + j) * scratch.row_size + e, value);
          });
    }
  }
}

// Two tiles at once, which share the loads of the weights.
struct Two {
  Vector a, b;
};
DMFAST_INLINE Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
DMFAST_INLINE Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
DMFAST_INLINE Two operator*(float x, Two y) { return {x * y.a, x * y.b}; }

// The products (i, j) of a tile, v [36][row_size], and one vector of filters, u [36][channels].
template <int kChannels>
struct ThinProduct {
  const float *v, *u;
  int64_t row_size;

  DMFAST_INLINE Vector operator()(int i, int j) const {
    const int64_t point = i * 6 + j;
    Vector sum = v[point * row_size] * load(u + point * kChannels * kLanes);
    DMFAST_UNROLLED
    for (int c = 1; c < kChannels; ++c) {
      sum += v[point * row_size + c] * load(u + (point * kChannels + c) * kLanes);
    }
    return sum;
  }

  DMFAST_INLINE Two two(int i, int j) const {
    const int64_t point = i * 6 + j;
    const float* first = v + point * row_size;
    const Vector weights = load(u + point * kChannels * kLanes);
    Two sum{first[0] * weights, first[kChannels] * weights};
    DMFAST_UNROLLED
    for (int c = 1; c < kChannels; ++c) {
      const Vector others = load(u + (point * kChannels + c) * kLanes);
      sum.a += first[c] * others;
      sum.b += first[kChannels + c] * others;
    }
    return sum;
  }
};

// The convolution of the image in scratch.inputs with one vector of filters, and the sum of it.
template <int kChannels>
DMFAST_INLINE Vector convolve_thin(const ConvBlock& block, const float* u,
                                   const ThinScratch& scratch, const Plane<float>& to) {
  ThinProduct<kChannels> product{scratch.inputs, u, scratch.row_size};
  Vector sum{};
  for (int64_t tile_row = 0; tile_row < block.tile_rows(); ++tile_row) {
    Vector run{};
    int64_t tile = 0;
    product.v = scratch.inputs + tile_row * kPoints * scratch.row_size;
    if (tile_row * 4 + 4 <= block.conv_height()) {
      for (; (tile + 2) * 4 <= to.width; tile += 2, product.v += 2 * kChannels) {
        float* corner = to.at(tile_row * 4, tile * 4);
        in_both_dimensions<6, 4, Two>([](const Two* d, Two* out) { out_of_domain(d, out); },
                                      [&](int i, int j) { return product.two(i, j); },
                                      [&](int i, int j, Two value) {
                                        run += value.a + value.b;
                                        float* pixel = corner + (i * to.width + j) * to.pixel;
                                        store(pixel, value.a);
                                        store(pixel + 4 * to.pixel, value.b);
                                      });
      }
    }
    for (; tile < block.tile_columns(); ++tile, product.v += kChannels) {
      transform_output(product, to, block.conv_height(), tile_row * 4, tile * 4,
                       [&](Vector value) { run += value; });
    }
    sum += run;
  }
  return sum;
}

template <int kChannels>
void forward_thin(const ConvBlock& block, const float* packed, const Norm& norm,
                  const BlockInput& x, int64_t images, float* out, float* statistics,
                  void* workspace) {
  const ThinScratch scratch(block, false, workspace);
  const int64_t filters = block.filters;
  const Plane<float> conv{scratch.conv, block.conv_width(), kLanes};
  const Plane<const float> values{scratch.conv, block.conv_width(), kLanes};
  for (int64_t image = 0; image < images; ++image) {
    take_in<kChannels>(block, x, image, scratch);
    for (int64_t k = 0; k < filters; k += kLanes) {
      const Vector sum =
          convolve_thin<kChannels>(block, packed + k * kPoints * kChannels, scratch, conv);
      const Statistics found = norm.given
                                   ? Statistics::read(norm.given + k, filters)
                                   : Statistics::of(values, block.conv_height(), sum, norm.eps);
      if (statistics) found.write(statistics + image * 2 * filters + k, filters);
      if (!out) continue;
      normalise_and_pool(block, values, Scaling(found, norm, k),
                         {out + image * block.out_size() + k, block.out_width(), filters});
    }
  }
}

// For a vector of filters: partials[tap and channel][filters] of the image in scratch.inputs, from
// the gradient of its convolution.
template <int kChannels>
DMFAST_INLINE void weight_partials_thin(const ConvBlock& block, const ThinScratch& scratch,
                                        const Plane<const float>& gradient, int64_t filters,
                                        float* partials) {
  Vector sums[kPoints * kChannels];
  for (int i = 0; i < kPoints * kChannels; ++i) sums[i] = Vector{};
  const auto apply = [](const auto* y, auto* out) { gradient_into_domain(y, out); };
  for (int64_t row = 0; row < block.conv_height(); row += 4) {
    const float* v = scratch.inputs + row / 4 * kPoints * scratch.row_size;
    int64_t column = 0;
    if (row + 4 <= block.conv_height()) {
      for (; column + 8 <= block.conv_width(); column += 8, v += 2 * kChannels) {
        const float* corner = gradient.at(row, column);
        in_both_dimensions<4, 6, Two>(
            apply,
            [&](int i, int j) {
              const float* pixel = corner + (i * gradient.width + j) * gradient.pixel;
              return Two{load(pixel), load(pixel + 4 * gradient.pixel)};
            },
            [&](int i, int j, Two value) {
              const int64_t point = i * 6 + j;
              const float* factors = v + point * scratch.row_size;
              DMFAST_UNROLLED
              for (int c = 0; c < kChannels; ++c) {
                sums[point * kChannels + c] +=
                    factors[c] * value.a + factors[kChannels + c] * value.b;
              }
            });
      }
    }
    for (; column < block.conv_width(); column += 4, v += kChannels) {
      in_both_dimensions<4, 6, Vector>(
          apply,
          [&](int i, int j) {
            const bool inside = row + i < block.conv_height() && column + j < block.conv_width();
            return inside ? load(gradient.at(row + i, column + j)) : Vector{};
          },
          [&](int i, int j, Vector value) {
            const int64_t point = i * 6 + j;
            DMFAST_UNROLLED
            for (int c = 0; c < kChannels; ++c) {
              sums[point * kChannels + c] += v[point * scratch.row_size + c] * value;
            }
          });
    }
  }
  for (int c = 0; c < kChannels; ++c) {
    in_both_dimensions<6, 3, Vector>(
        [](const Vector* d, Vector* out) { weights_out_of_domain(d, out); },
        [&](int i, int j) { return sums[(i * 6 + j) * kChannels + c]; },
        [&](int i, int j, Vector value) {
          store(partials + ((i * 3 + j) * kChannels + c) * filters, value);
        });
  }
}

// The gradient of one image from that of its convolution, [conv_size]: tiles of it are multiplied
// with the turned weights, summed over the filters lane by lane, and the lanes at last.
template <int kChannels>
void input_gradient_thin(const ConvBlock& block, const float* turned, const float* gradient,
                         const float* zeros, float* to) {
  const int64_t filters = block.filters, padding = 2 - block.padding;
  for (int64_t row = 0; row < block.height; row += 4) {
    for (int64_t column = 0; column < block.width; column += 4) {
      const Patch<6> patch(gradient, block.conv_height(), block.conv_width(), filters,
                           row - padding, column - padding, zeros);
      Vector sums[kPoints * kChannels];
      for (int i = 0; i < kPoints * kChannels; ++i) sums[i] = Vector{};
      for (int64_t k = 0; k < filters; k += kLanes) {
        const float* u = turned + k * kPoints * kChannels;
        in_both_dimensions<6, 6, Vector>(
            [](const Vector* d, Vector* out) { into_domain(d, out); },
            [&](int i, int j) { return load(patch.pixels[i * 6 + j] + k); },
            [&](int i, int j, Vector value) {
              const int point = i * 6 + j;
              DMFAST_UNROLLED
              for (int c = 0; c < kChannels; ++c) {
                sums[point * kChannels + c] += value * load(u + (point * kChannels + c) * kLanes);
              }
            });
      }
      for (int c = 0; c < kChannels; ++c) {
        in_both_dimensions<6, 4, Vector>(
            [](const Vector* d, Vector* out) { out_of_domain(d, out); },
            [&](int i, int j) { return sums[(i * 6 + j) * kChannels + c]; },
            [&](int i, int j, Vector value) {
              if (row + i >= block.height || column + j >= block.width) return;
              to[((row + i) * block.width + column + j) * kChannels + c] = sum_of_lanes(value);
            });
      }
    }
  }
}

template <int kChannels>
void backward_thin(const ConvBlock& block, const float* packed, const float* turned,
                   const Norm& norm, const BlockGradient& gradient, int64_t images,
                   void* workspace) {
  const ThinScratch scratch(block, true, workspace);
  const int64_t filters = block.filters;
  const Plane<float> conv{scratch.conv, block.conv_width(), kLanes};
  const NormBackward norm_backward{block, norm, gradient, scratch.gradient};
  __builtin_memset(scratch.zeros, 0, sizeof(float) * filters);
  for (int64_t image = 0; image < images; ++image) {
    take_in<kChannels>(block, gradient.x, image, scratch);
    for (int64_t k = 0; k < filters; k += kLanes) {
      convolve_thin<kChannels>(block, packed + k * kPoints * kChannels, scratch, conv);
      norm_backward({conv.data, conv.width, conv.pixel}, image, k);
      if (gradient.weight_partials) {
        weight_partials_thin<kChannels>(
            block, scratch, {scratch.gradient + k, block.conv_width(), filters}, filters,
            gradient.weight_partials + image * 9 * kChannels * filters + k);
      }
    }
    if (gradient.x_gradient) {
      input_gradient_thin<kChannels>(block, turned, scratch.gradient, scratch.zeros,
                                     gradient.x_gradient + image * block.input_size());
    }
  }
}

template <int kChannels>
void norm_backward_thin(const ConvBlock& block, const float* packed, const Norm& norm,
                        const BlockGradient& gradient, int64_t images, void* workspace) {
  const ThinScratch scratch(block, true, workspace);
  const Plane<float> conv{scratch.conv, block.conv_width(), kLanes};
  const NormBackward norm_backward{block, norm, gradient, nullptr};
  for (int64_t image = 0; image < images; ++image) {
    take_in<kChannels>(block, gradient.x, image, scratch);
    for (int64_t k = 0; k < block.filters; k += kLanes) {
      convolve_thin<kChannels>(block, packed + k * kPoints * kChannels, scratch, conv);
      norm_backward({conv.data, conv.width, conv.pixel}, image, k);
    }
  }
}

// [filters / kLanes][36][channels][kLanes]
void pack_thin(const ConvBlock& block, const float* weights, bool turned, float* packed) {
  for (int64_t k = 0; k < block.filters; k += kLanes) {
    for (int64_t c = 0; c < block.channels; ++c) {
      Vector taps[9];
      for (int tap = 0; tap < 9; ++tap) {
        float lanes[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          lanes[lane] = weights[((k + lane) * block.channels + c) * 9 + (turned ? 8 - tap : tap)];
        }
        taps[tap] = load(lanes);
      }
      in_both_dimensions<3, 6, Vector>(
          [](const Vector* d, Vector* out) { weights_into_domain(d, out); },
          [&](int i, int j) { return taps[i * 3 + j]; },
          [&](int i, int j, Vector value) {
            store(packed + ((k * kPoints + (i * 6 + j) * kLanes) * block.channels + c * kLanes),
                  value);
          });
    }
  }
}

// ---- The table ---------------------------------------------------------------------------------

int64_t packed_bytes(const ConvBlock& block) {
  return kPoints * block.channels * block.filters * static_cast<int64_t>(sizeof(float));
}

void pack(const ConvBlock& block, const float* weights, bool turned, void* packed) {
  if (block.thin()) {
    pack_thin(block, weights, turned, static_cast<float*>(packed));
  } else if (block.bfloat16) {
    pack_wide<BFloat16>(block, weights, turned, packed);
  } else {
    pack_wide<Float32>(block, weights, turned, packed);
  }
}

int64_t workspace_bytes(const ConvBlock& block, bool backward) {
  if (block.thin()) return ThinScratch(block, backward, nullptr).bytes;
  return block.bfloat16 ? wide_workspace_bytes<BFloat16>(block, backward)
                        : wide_workspace_bytes<Float32>(block, backward);
}

// Constants as types, for generic lambdas.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls body with the number of channels of a thin block.
template <typename Body>
DMFAST_INLINE void with_channels(const ConvBlock& block, const Body& body) {
  switch (block.channels) {
    case 1: return body(Constant<1>{});
    case 2: return body(Constant<2>{});
    case 3: return body(Constant<3>{});
    default: return body(Constant<4>{});
  }
}

// Calls body with the precision of a wide block and the number of vectors in its steps.
template <typename Body>
DMFAST_INLINE void with_precision(const ConvBlock& block, const Body& body) {
  const bool two = takes_vectors(block.filters, 2);
  if (block.bfloat16) {
    two ? body(BFloat16{}, Constant<2>{}) : body(BFloat16{}, Constant<1>{});
  } else {
    two ? body(Float32{}, Constant<2>{}) : body(Float32{}, Constant<1>{});
  }
}

void forward(const ConvBlock& block, const void* packed, const Norm& norm, const BlockInput& x,
             int64_t images, float* out, float* z, float* statistics, void* workspace) {
  if (block.thin()) {
    with_channels(block, [&](auto channels) {
      forward_thin<decltype(channels)::value>(block, static_cast<const float*>(packed), norm, x,
                                              images, out, statistics, workspace);
    });
    return;
  }
  with_precision(block, [&](auto precision, auto vectors) {
    forward_wide<decltype(precision), decltype(vectors)::value>(block, packed, norm, x.data, images,
                                                                out, z, statistics, workspace);
  });
}

void backward(const ConvBlock& block, const void* packed, const void* turned, const Norm& norm,
              const BlockGradient& gradient, int64_t images, void* workspace) {
  if (block.thin()) {
    with_channels(block, [&](auto channels) {
      backward_thin<decltype(channels)::value>(block, static_cast<const float*>(packed),
                                               static_cast<const float*>(turned), norm, gradient,
                                               images, workspace);
    });
  } else if (block.bfloat16) {
    backward_wide<BFloat16>(block, turned, norm, gradient, images, workspace);
  } else {
    backward_wide<Float32>(block, turned, norm, gradient, images, workspace);
  }
}

void norm_backward(const ConvBlock& block, const void* packed, const Norm& norm,
                   const BlockGradient& gradient, int64_t images, void* workspace) {
  if (block.thin()) {
    with_channels(block, [&](auto channels) {
      norm_backward_thin<decltype(channels)::value>(block, static_cast<const float*>(packed), norm,
                                                    gradient, images, workspace);
    });
    return;
  }
  const NormBackward of_image{block, norm, gradient, nullptr};
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t k = 0; k < block.filters; k += kLanes) {
      of_image({gradient.z + image * block.conv_size() + k, block.conv_width(), block.filters},
               image, k);
    }
  }
}

int64_t transforms_bytes(const ConvBlock& block, bool of_inputs) {
  const int64_t size = block.bfloat16 ? sizeof(BFloat16::Element) : sizeof(float);
  const int64_t width = of_inputs ? block.channels : block.filters;
  return kPoints * (block.gradient_tiles() * width + kSkew) * size;
}

void weight_gradient(const ConvBlock& block, const void* inputs, const void* outputs, int64_t point,
                     int64_t tiles, float* sums, void* workspace) {
  with_precision(block, [&](auto precision, auto vectors) {
    weight_gradient_wide<decltype(precision), decltype(vectors)::value>(
        block, inputs, outputs, point, tiles, sums, workspace);
  });
}

}  // namespace

namespace DMFAST_SET {
extern const ConvBlockKernels kernels;
const ConvBlockKernels kernels = {packed_bytes,
                                  pack,
                                  images_at_once,
                                  workspace_bytes,
                                  forward,
                                  pool,
                                  backward,
                                  norm_backward,
                                  transforms_bytes,
                                  weight_gradient,
                                  weight_gradient_out_wide};
}  // namespace DMFAST_SET

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// Blocks of 16 channels and more. As winograd_simd.h, for one source of each instruction set.
//
// Tiles of a few whole images are taken into the domain, multiplied with the weights of some
// filters at a time, and taken out again into planes of those filters, which are normalised and
// pooled while they are in the cache. Nothing that is computed for an image depends on others.
#pragma once

#include "norm_simd.h"

namespace dmfast {
namespace {

// Tiles in the domain at once: 128 channels of them take half a megabyte in float32.
constexpr int64_t kTilesAtOnce = 32;
constexpr int kRows = DMFAST_ROWS;  // of a product that is held in registers
// Points are so many elements further apart than they need be: at a power of two all 36 of a tile
// would fall into one set of the cache.
constexpr int64_t kSkew = 32;

// A thread's scratch, taken in pieces; from a null pointer it counts what is needed.
class Arena {
 public:
  explicit Arena(void* memory) : begin_(static_cast<char*>(memory)), used_(0) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = begin_ ? reinterpret_cast<T*>(begin_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_;
};

int64_t images_at_once(const ConvBlock& block) {
  const int64_t fit = kTilesAtOnce / block.tiles();
  return block.thin() || fit < 1 ? 1 : fit;
}

// Whether the filters are multiplied in steps of so many vectors.
DMFAST_INLINE bool takes_vectors(int64_t filters, int64_t vectors) {
  return filters % (vectors * kLanes) == 0;
}

// ---- Into the domain ---------------------------------------------------------------------------

// The elements (row, column) on of an image that a tile is made of; what is outside is zeros.
template <int kSide>
struct Patch {
  const float* pixels[kSide * kSide];

  DMFAST_INLINE Patch(const float* image, int64_t height, int64_t width, int64_t channels,
                      int64_t row, int64_t column, const float* zeros) {
    for (int i = 0; i < kSide; ++i) {
      const int64_t y = row + i;
      for (int j = 0; j < kSide; ++j) {
        const int64_t x = column + j;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        pixels[i * kSide + j] = inside ? image + (y * width + x) * channels : zeros;
      }
    }
  }
};

// Tiles first to first + count - 1 of images in channels_last to v: element c of tile t at a point
// is v[point * stride + (t - first) * channels + c].
template <typename Precision>
void transform_inputs(const ConvBlock& block, const float* images, int64_t first, int64_t count,
                      const float* zeros, typename Precision::Element* v, int64_t stride) {
  const int64_t columns = block.tile_columns(), tiles = block.tiles();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = (first + t) % tiles;
    const float* image = images + (first + t) / tiles * block.input_size();
    const Patch<6> patch(image, block.height, block.width, block.channels,
                         tile / columns * 4 - block.padding, tile % columns * 4 - block.padding,
                         zeros);
    for (int64_t c = 0; c < block.channels; c += kLanes) {
      in_both_dimensions<6, 6, Vector>(
          [](const Vector* d, Vector* out) { into_domain(d, out); },
          [&](int i, int j) { return load(patch.pixels[i * 6 + j] + c); },
          [&](int i, int j, Vector value) {
            Precision::put(v + (i * 6 + j) * stride + t * block.channels + c, value);
          });
    }
  }
}

// The gradients of one image's convolution [conv_size] to those of its products.
template <typename Precision>
void transform_gradients(const ConvBlock& block, const float* gradient, const float* zeros,
                         typename Precision::Element* m, int64_t stride) {
  const int64_t columns = block.tile_columns();
  for (int64_t tile = 0; tile < block.tiles(); ++tile) {
    const Patch<4> patch(gradient, block.conv_height(), block.conv_width(), block.filters,
                         tile / columns * 4, tile % columns * 4, zeros);
    for (int64_t k = 0; k < block.filters; k += kLanes) {
      in_both_dimensions<4, 6, Vector>(
          [](const Vector* d, Vector* out) { gradient_into_domain(d, out); },
          [&](int i, int j) { return load(patch.pixels[i * 4 + j] + k); },
          [&](int i, int j, Vector value) {
            Precision::put(m + (i * 6 + j) * stride + tile * block.filters + k, value);
          });
    }
  }
}

// ---- Out of the domain -------------------------------------------------------------------------

// A tile of product(i, j) to its place in a plane; calls seen(value) for what lies inside.
template <typename Product, typename Seen>
DMFAST_INLINE void transform_output(const Product& product, const Plane<float>& to, int64_t height,
                                    int64_t row, int64_t column, const Seen& seen) {
  const auto apply = [](const Vector* d, Vector* out) { out_of_domain(d, out); };
  if (row + 4 <= height && column + 4 <= to.width) {
    float* corner = to.at(row, column);
    in_both_dimensions<6, 4, Vector>(apply, product, [&](int i, int j, Vector value) {
      seen(value);
      store(corner + (i * to.width + j) * to.pixel, value);
    });
    return;
  }
  in_both_dimensions<6, 4, Vector>(apply, product, [&](int i, int j, Vector value) {
    if (row + i >= height || column + j >= to.width) return;
    seen(value);
    store(to.at(row + i, column + j), value);
  });
}

// ---- Convolution -------------------------------------------------------------------------------

template <typename Precision>
struct WideScratch {
  typename Precision::Element* inputs;  // [36][tiles, channels]
  float* products;                      // [36][tiles, filters of a step]
  float* zeros;                         // [channels or filters]
  float* conv;                          // planes of pixels [images or steps][conv, a step]
  float* sums;                          // [images][filters]: of the convolution
  float* gradient;                      // [images][conv_size], for the backward
  int64_t input_stride, product_stride, bytes;

  WideScratch(const ConvBlock& block, int64_t vectors, void* memory) {
    Arena arena(memory);
    const int64_t tiles = round_up(kTilesAtOnce, kRows), step = vectors * kLanes;
    const int64_t images = images_at_once(block);
    input_stride = tiles * block.channels + kSkew;
    product_stride = tiles * step + kSkew;
    inputs = arena.take<typename Precision::Element>(kPoints * input_stride);
    products = arena.take<float>(kPoints * product_stride);
    zeros = arena.take<float>(block.channels > block.filters ? block.channels : block.filters);
    conv = arena.take<float>(block.conv_height() * block.conv_width() *
                             (block.tiles() > kTilesAtOnce ? block.filters : images * step));
    sums = arena.take<float>(images * block.filters);
    bytes = arena.used();
  }

  // The products of a tile and a vector of filters, the first of which is at m.
  auto product(const float* m) const {
    return [m, stride = product_stride](int i, int j) { return load(m + (i * 6 + j) * stride); };
  }
};

// Convolves images in channels_last, at most images_at_once(block). When the products of tiles
// start to start + count - 1 and of a step's filters are there, calls made(step, start, count); the
// product of tile t and filter k is scratch.products[point * product_stride + (t - start) * width +
// k], width being that of a step.
template <typename Precision, int kVectors, typename ProductsMade>
DMFAST_INLINE void convolve(const ConvBlock& block, const void* packed, const float* x,
                            int64_t images, const WideScratch<Precision>& scratch,
                            const ProductsMade& made) {
  using Element = typename Precision::Element;
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t total = images * block.tiles();
  const int64_t weights = block.channels * kWidth;  // of a point and a step
  for (int64_t start = 0; start < total; start += kTilesAtOnce) {
    const int64_t count = smaller(kTilesAtOnce, total - start);
    transform_inputs<Precision>(block, x, start, count, scratch.zeros, scratch.inputs,
                                scratch.input_stride);
    const Element* u = static_cast<const Element*>(packed);
    for (int64_t step = 0; step < block.filters / kWidth; ++step) {
      for (int64_t point = 0; point < kPoints; ++point, u += weights) {
        const Element* v = scratch.inputs + point * scratch.input_stride;
        float* m = scratch.products + point * scratch.product_stride;
        // The last rows may be those of an earlier pass: finite or not, nobody reads what they
        // give.
        for (int64_t t = 0; t < count; t += kRows) {
          multiply_rows<kRows, kVectors>(v + t * block.channels, block.channels, u, block.channels,
                                         m + t * kWidth);
        }
      }
      made(step, start, count);
    }
  }
}

// Calls visit(image, first, last) for the runs of tiles of one image in start to start + count - 1.
template <typename Visit>
DMFAST_INLINE void for_each_image(int64_t tiles, int64_t start, int64_t count, const Visit& visit) {
  for (int64_t first = start; first < start + count;) {
    const int64_t image = first / tiles;
    const int64_t last = smaller((image + 1) * tiles, start + count);
    visit(image, first, last);
    first = last;
  }
}

template <typename Precision, int kVectors>
void forward_wide(const ConvBlock& block, const void* packed, const Norm& norm, const float* x,
                  int64_t images, float* out, float* z, float* statistics, void* workspace) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const WideScratch<Precision> scratch(block, kVectors, workspace);
  __builtin_memset(scratch.zeros, 0, sizeof(float) * block.channels);
  const int64_t tiles = block.tiles(), columns = block.tile_columns();
  const int64_t pixels = block.conv_height() * block.conv_width(), filters = block.filters;
  const int64_t at_once = images_at_once(block);
  const bool in_parts = tiles > kTilesAtOnce;
  for (int64_t begin = 0; begin < images; begin += at_once) {
    const int64_t now = smaller(at_once, images - begin);
    // Where the convolution of an image and a vector of filters is put.
    const auto plane = [&](int64_t image, int64_t step, int64_t vector) -> Plane<float> {
      if (z) {
        return {z + (begin + image) * block.conv_size() + step * kWidth + vector * kLanes,
                block.conv_width(), filters};
      }
      return {scratch.conv + (in_parts ? step : image) * pixels * kWidth + vector * kLanes,
              block.conv_width(), kWidth};
    };
    const auto finish = [&](int64_t image, int64_t step) {
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        const int64_t filter = step * kWidth + vector * kLanes;
        const Plane<float> values = plane(image, step, vector);
        const Plane<const float> from{values.data, values.width, values.pixel};
        const Vector sum = load(scratch.sums + image * filters + filter);
        const Statistics found = norm.given
                                     ? Statistics::read(norm.given + filter, filters)
                                     : Statistics::of(from, block.conv_height(), sum, norm.eps);
        if (statistics) found.write(statistics + (begin + image) * 2 * filters + filter, filters);
        if (!out) continue;
        normalise_and_pool(
            block, from, Scaling(found, norm, filter),
            {out + (begin + image) * block.out_size() + filter, block.out_width(), filters});
      }
    };
    const auto take_out = [&](int64_t step, int64_t start, int64_t image, int64_t first,
                              int64_t last) {
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        const Plane<float> to = plane(image, step, vector);
        const float* m = scratch.products + vector * kLanes;
        Vector run{};
        for (int64_t t = first; t < last; ++t) {
          const int64_t tile = t - image * tiles;
          transform_output(scratch.product(m + (t - start) * kWidth), to, block.conv_height(),
                           tile / columns * 4, tile % columns * 4,
                           [&](Vector value) { run += value; });
        }
        float* sum = scratch.sums + image * filters + step * kWidth + vector * kLanes;
        store(sum, first == image * tiles ? run : load(sum) + run);
      }
    };
    convolve<Precision, kVectors>(block, packed, x + begin * block.input_size(), now, scratch,
                                  [&](int64_t step, int64_t start, int64_t count) {
                                    for_each_image(tiles, start, count,
                                                   [&](int64_t image, int64_t first, int64_t last) {
                                                     take_out(step, start, image, first, last);
                                                     if (!in_parts) finish(image, step);
                                                   });
                                  });
    for (int64_t step = 0; in_parts && step < filters / kWidth; ++step) finish(0, step);
  }
}

// What follows the convolution: z [images][conv_size] to out.
void pool(const ConvBlock& block, const Norm& norm, const float* z, int64_t images, float* out) {
  const int64_t filters = block.filters;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t k = 0; k < filters; k += kLanes) {
      const Scaling scaling(Statistics::read(norm.given + k, filters), norm, k);
      normalise_and_pool(block, {z + image * block.conv_size() + k, block.conv_width(), filters},
                         scaling, {out + image * block.out_size() + k, block.out_width(), filters});
    }
  }
}

// The convolution alone: images in channels_last to [conv_size] each.
template <typename Precision, int kVectors>
void convolve_to(const ConvBlock& block, const void* packed, const float* x, int64_t images,
                 float* to, void* workspace) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const WideScratch<Precision> scratch(block, kVectors, workspace);
  __builtin_memset(scratch.zeros, 0, sizeof(float) * block.channels);
  const int64_t columns = block.tile_columns(), tiles = block.tiles();
  convolve<Precision, kVectors>(
      block, packed, x, images, scratch, [&](int64_t step, int64_t start, int64_t count) {
        for (int64_t t = start; t < start + count; ++t) {
          const int64_t tile = t % tiles;
          for (int64_t vector = 0; vector < kVectors; ++vector) {
            const int64_t filter = step * kWidth + vector * kLanes;
            const Plane<float> plane{to + t / tiles * block.conv_size() + filter,
                                     block.conv_width(), block.filters};
            const float* m = scratch.products + (t - start) * kWidth + vector * kLanes;
            transform_output(scratch.product(m), plane, block.conv_height(), tile / columns * 4,
                             tile % columns * 4, [](Vector) {});
          }
        }
      });
}

// ---- Gradients ---------------------------------------------------------------------------------

template <typename Precision>
void backward_wide(const ConvBlock& block, const void* turned, const Norm& norm,
                   const BlockGradient& gradient, int64_t images, void* workspace) {
  using Element = typename Precision::Element;
  const ConvBlock adjoint = block.adjoint();
  const int64_t at_once = images_at_once(adjoint), filters = block.filters;
  Arena arena(workspace);
  float* of_conv = arena.take<float>(at_once * block.conv_size());
  const int64_t most = block.channels > filters ? block.channels : filters;
  float* zeros = arena.take<float>(most);
  char* rest = static_cast<char*>(workspace) + arena.used();
  __builtin_memset(zeros, 0, sizeof(float) * most);
  for (int64_t begin = 0; begin < images; begin += at_once) {
    const int64_t now = smaller(at_once, images - begin);
    for (int64_t i = 0; i < now; ++i) {
      const int64_t image = begin + i;
      const NormBackward norm_backward{block, norm, gradient, of_conv + i * block.conv_size()};
      for (int64_t k = 0; k < filters; k += kLanes) {
        norm_backward({gradient.z + image * block.conv_size() + k, block.conv_width(), filters},
                      image, k);
      }
      if (gradient.inputs) {
        const int64_t tile = gradient.first_tile + image * block.tiles();
        transform_inputs<Precision>(block, gradient.x.data, image * block.tiles(), block.tiles(),
                                    zeros,
                                    static_cast<Element*>(gradient.inputs) + tile * block.channels,
                                    block.gradient_tiles() * block.channels + kSkew);
        transform_gradients<Precision>(block, of_conv + i * block.conv_size(), zeros,
                                       static_cast<Element*>(gradient.outputs) + tile * filters,
                                       block.gradient_tiles() * filters + kSkew);
      }
    }
    if (gradient.x_gradient) {
      float* to = gradient.x_gradient + begin * block.input_size();
      if (takes_vectors(block.channels, 2)) {
        convolve_to<Precision, 2>(adjoint, turned, of_conv, now, to, rest);
      } else {
        convolve_to<Precision, 1>(adjoint, turned, of_conv, now, to, rest);
      }
    }
  }
}

template <typename Precision>
int64_t wide_workspace_bytes(const ConvBlock& block, bool backward) {
  if (!backward) return WideScratch<Precision>(block, 2, nullptr).bytes;
  const ConvBlock adjoint = block.adjoint();
  Arena arena(nullptr);
  arena.take<float>(images_at_once(adjoint) * block.conv_size());
  arena.take<float>(block.channels > block.filters ? block.channels : block.filters);
  const int64_t images = arena.used() + WideScratch<Precision>(adjoint, 2, nullptr).bytes;
  const int64_t pairs = block.gradient_tiles() * (block.channels + block.filters) * 2 + 256;
  return images > pairs ? images : pairs;
}

template <typename Precision, int kVectors>
void weight_gradient_wide(const ConvBlock& block, const void* inputs, const void* outputs,
                          int64_t point, int64_t tiles, float* sums, void* workspace) {
  using Element = typename Precision::Element;
  const int64_t channels = block.channels, filters = block.filters;
  const Element* v =
      static_cast<const Element*>(inputs) + point * (block.gradient_tiles() * channels + kSkew);
  const Element* m =
      static_cast<const Element*>(outputs) + point * (block.gradient_tiles() * filters + kSkew);
#ifdef DMFAST_BF16_PRODUCTS
  if constexpr (Precision::kPair == 2) {
    // Pairs of tiles side by side, the last one with zeros.
    Arena arena(workspace);
    Element* v_pairs = arena.take<Element>(block.gradient_tiles() * channels);
    Element* m_pairs = arena.take<Element>(block.gradient_tiles() * filters);
    for (int64_t t = 0; t < tiles; t += 2) {
      const bool last = t + 1 == tiles;
      interleave(v + t * channels, channels, last, v_pairs + t * channels);
      interleave(m + t * filters, filters, last, m_pairs + t * filters);
    }
    v = v_pairs;
    m = m_pairs;
  }
#endif
  (void)workspace;
  for (int64_t k = 0; k < filters; k += kVectors * kLanes) {
    for (int64_t c = 0; c < channels; c += kRows) {
      multiply_columns<kRows, kVectors>(v + c * Precision::kPair, channels,
                                        m + k * Precision::kPair, filters, tiles,
                                        sums + c * filters + k, filters);
    }
  }
}

void weight_gradient_out_wide(const ConvBlock& block, const float* sums, int64_t first_filter,
                              int64_t last_filter, float* gradient) {
  const int64_t channels = block.channels, filters = block.filters;
  for (int64_t k = first_filter; k < last_filter; k += kLanes) {
    for (int64_t c = 0; c < channels; ++c) {
      const float* at = sums + c * filters + k;
      in_both_dimensions<6, 3, Vector>(
          [](const Vector* d, Vector* out) { weights_out_of_domain(d, out); },
          [&](int i, int j) { return load(at + (i * 6 + j) * channels * filters); },
          [&](int i, int j, Vector value) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              gradient[((k + lane) * channels + c) * 9 + i * 3 + j] = value[lane];
            }
          });
    }
  }
}

// ---- Weights -----------------------------------------------------------------------------------

// The weights of one input channel and kLanes filters, in the domain. In the adjoint the two change
// places and the weights are turned.
template <typename Put>
DMFAST_INLINE void transform_weights(const ConvBlock& block, const float* weights, bool turned,
                                     int64_t channel, int64_t filter, const Put& put) {
  Vector taps[9];
  for (int tap = 0; tap < 9; ++tap) {
    float lanes[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t k = turned ? channel : filter + lane, c = turned ? filter + lane : channel;
      lanes[lane] = weights[(k * block.channels + c) * 9 + (turned ? 8 - tap : tap)];
    }
    taps[tap] = load(lanes);
  }
  in_both_dimensions<3, 6, Vector>(
      [](const Vector* d, Vector* out) { weights_into_domain(d, out); },
      [&](int i, int j) { return taps[i * 3 + j]; }, put);
}

// [steps][36][channels][filters of a step], with pairs of channels innermost in bfloat16.
template <typename Precision>
void pack_wide(const ConvBlock& block, const float* weights, bool turned, void* packed) {
  using Element = typename Precision::Element;
  const int64_t channels = turned ? block.filters : block.channels;
  const int64_t filters = turned ? block.channels : block.filters;
  const int64_t width = (takes_vectors(filters, 2) ? 2 : 1) * kLanes;
  for (int64_t k = 0; k < filters; k += kLanes) {
    Element* step = static_cast<Element*>(packed) + k / width * kPoints * channels * width;
    for (int64_t c = 0; c < channels; ++c) {
      constexpr int64_t kPair = Precision::kPair;
      Element* to = step + (c - c % kPair) * width + k % width * kPair + c % kPair;
      transform_weights(block, weights, turned, c, k, [&](int i, int j, Vector value) {
        Element lanes[kLanes];
        Precision::put(lanes, value);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          to[(i * 6 + j) * channels * width + lane * kPair] = lanes[lane];
        }
      });
    }
  }
}

}  // namespace
}  // namespace dmfast

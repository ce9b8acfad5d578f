// SPDX-License-Identifier: MIT
// A ConvNet block on the CPU: 3x3 convolution, instance norm, ReLU and 2x2 mean pooling of images
// in channels_last, over raw pointers. Its kernels exist once for each instruction set.
#pragma once

#include <cstdint>

namespace dmfast {

// With few channels a block is "thin": every image is convolved whole in the first-level cache, in
// float32. Other blocks take multiples of 16 channels.
constexpr int64_t kThinChannels = 4;
constexpr int64_t kChannelStep = 16;
constexpr int64_t kPoints = 36;  // of F(4x4, 3x3): a tile of 4x4 outputs has 6x6 inputs

struct ConvBlock {
  int64_t channels, filters, height, width, padding;  // of the input
  bool bfloat16;                                      // round both factors of the products to it

  bool thin() const { return channels <= kThinChannels; }
  int64_t conv_height() const { return height + 2 * padding - 2; }
  int64_t conv_width() const { return width + 2 * padding - 2; }
  int64_t out_height() const { return conv_height() / 2; }
  int64_t out_width() const { return conv_width() / 2; }
  int64_t tile_rows() const { return (conv_height() + 3) / 4; }
  int64_t tile_columns() const { return (conv_width() + 3) / 4; }
  int64_t tiles() const { return tile_rows() * tile_columns(); }
  int64_t input_size() const { return height * width * channels; }
  int64_t conv_size() const { return conv_height() * conv_width() * filters; }
  int64_t out_size() const { return out_height() * out_width() * filters; }
  // A weight gradient is summed over so many tiles at a time, and at least an image: transforms of
  // that many fit the cache that cores share. Even, for tiles go in pairs.
  int64_t gradient_tiles() const { return tiles() > 256 ? tiles() + tiles() % 2 : 256; }
  // The convolution that takes gradients of the output to those of the input.
  ConvBlock adjoint() const {
    return {filters, channels, conv_height(), conv_width(), 2 - padding, bfloat16};
  }
};

// What follows the convolution; null weight and bias are 1 and 0.
struct Norm {
  const float *weight, *bias;  // [filters]
  float eps;
  // [2, filters]: mean and 1 / sqrt(variance + eps) for all images; null for each image's own.
  const float* given;
};

// Images of a block's input: strides in elements; channels_last and dense unless the block is thin.
struct BlockInput {
  const float* data;
  int64_t sn, sc, sy, sx;
};

// The gradients of a range of images, and what they are made of.
struct BlockGradient {
  BlockInput x;
  const float* z;           // [images, conv_size], or null for a thin block, which makes it anew
  const float* statistics;  // [images, 2, filters], or null where they are given
  // [2, filters]: what the gradients of the norm's weight and bias come to a pixel of all images
  // whose statistics they share; null for each image's own.
  const float* shares;
  const float* gradient;   // [images, out_size]
  float* x_gradient;       // [images, input_size] or null
  float* norm_gradients;   // [images, 2, filters]: of each image's weight and bias; unless shares
  float* weight_partials;  // thin: [images, 9 channels, filters] or null
  void *inputs, *outputs;  // else: transforms of gradient_tiles(), or null
  int64_t first_tile;      // where this range's tiles begin in them
};

struct ConvBlockKernels {
  // The weights [filters, channels, 3, 3] in the form that the kernels read; `turned` ones take
  // gradients of the output to those of the input.
  int64_t (*packed_bytes)(const ConvBlock& block);
  void (*pack)(const ConvBlock& block, const float* weights, bool turned, void* packed);

  // How many images are best passed at once, and the scratch that a thread needs for a pass.
  int64_t (*images_at_once)(const ConvBlock& block);
  int64_t (*workspace_bytes)(const ConvBlock& block, bool backward);

  // x -> where they are not null, out [images, out_size], z [images, conv_size] (no thin block
  // keeps it) and statistics [images, 2, filters], mean and 1 / sqrt(variance + eps).
  void (*forward)(const ConvBlock& block, const void* packed, const Norm& norm, const BlockInput& x,
                  int64_t images, float* out, float* z, float* statistics, void* workspace);
  // z -> out, of a block that is not thin.
  void (*pool)(const ConvBlock& block, const Norm& norm, const float* z, int64_t images,
               float* out);

  // `turned` weights are needed for x_gradient, the others by thin blocks.
  void (*backward)(const ConvBlock& block, const void* packed, const void* turned, const Norm& norm,
                   const BlockGradient& gradient, int64_t images, void* workspace);
  // norm_gradients alone.
  void (*norm_backward)(const ConvBlock& block, const void* packed, const Norm& norm,
                        const BlockGradient& gradient, int64_t images, void* workspace);
  int64_t (*transforms_bytes)(const ConvBlock& block, bool of_inputs);
  // Adds what `tiles` tiles in `inputs` and `outputs` give to point's [channels, filters].
  void (*weight_gradient)(const ConvBlock& block, const void* inputs, const void* outputs,
                          int64_t point, int64_t tiles, float* sums, void* workspace);
  // sums [36, channels, filters] -> gradient [filters, channels, 3, 3], for some filters.
  void (*weight_gradient_out)(const ConvBlock& block, const float* sums, int64_t first_filter,
                              int64_t last_filter, float* gradient);
};

// Those of the instruction set in use: see cpu_isa.h.
const ConvBlockKernels& conv_block_kernels();

namespace plain {
extern const ConvBlockKernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const ConvBlockKernels kernels;
}
namespace avx512 {
extern const ConvBlockKernels kernels;
}
namespace avx512_bf16 {
extern const ConvBlockKernels kernels;
}
#endif

}  // namespace dmfast

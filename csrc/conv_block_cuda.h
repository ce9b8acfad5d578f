// SPDX-License-Identifier: MIT
// A ConvNet block on a GPU in one kernel: 3x3 convolution, instance norm, ReLU and 2x2 mean
// pooling, and the adjoint, over raw pointers to the device's memory. Images are bfloat16,
// channels_last and dense; accumulators and statistics float32. What is read and written lies at
// multiples of 16 bytes, as torch's memory does. Each launch gives a CUDA error code, 0 for none;
// no images are no launch. Results do not depend on the order of blocks or threads.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dmfast {

// `networks` sets of weights, and as many of the images each, one network after another.
struct FusedBlock {
  int64_t images, networks;
  int64_t channels, filters, height, width, padding;  // of the input
  float eps;

  int64_t conv_height() const { return height + 2 * padding - 2; }
  int64_t conv_width() const { return width + 2 * padding - 2; }
  int64_t images_of_network() const { return networks > 0 ? images / networks : 0; }
};

// Null weight is 1, null bias 0. A stride is from network to network: filters, or 0 for one [K]
// that all networks share.
struct FusedNorm {
  const float *weight, *bias;
  int64_t weight_stride, bias_stride;

  DMFAST_HD FusedNorm of_network(int64_t network) const {
    return {weight ? weight + network * weight_stride : nullptr,
            bias ? bias + network * bias_stride : nullptr, 0, 0};
  }
};

// Whether the kernels take the block, on the current device: its shared memory bounds the channels.
// Two kinds are taken:
//   thin   1 to 4 channels; filters a multiple of 32 up to 256; conv_width a multiple of 8,
//          conv_height even; input and convolution of up to 128 x 128
//   wide   channels and filters 32, 64, 128 or 256, padding 1, square images with sides of 4, 8 or
//          16; backward filters to 128 and sides of 8 or 16
bool conv_block_fused(const FusedBlock& block, bool backward);

// Whether it is taken in a form of its own for sm_90a, by wgmma: never run so far (it cannot be
// emulated), so to be asked for by name. Forward, wide, filters multiples of 128, images of 8
// or 16.
bool conv_block_wgmma(const FusedBlock& block);

// Weights [networks, K, C, 3, 3] float32 to bfloat16 in the order in which the kernels read them;
// `turned` ones take gradients of the convolution's output to those of its input.
int64_t conv_block_packed_bytes(const FusedBlock& block, bool turned);
int conv_block_pack_launch(const FusedBlock& block, const float* weights, bool turned, void* packed,
                           void* stream);

// x [N, H, W, C] -> out [N, H'/2, W'/2, K], and statistics [N, 2, K] float32, mean and
// 1 / sqrt(variance + eps), unless it is null. wgmma: see conv_block_wgmma.
int conv_block_forward_launch(const FusedBlock& block, const void* x, const void* packed,
                              const FusedNorm& norm, void* out, float* statistics, bool wgmma,
                              void* stream);

// What a backward takes and gives. Null is what is not wanted: without x_gradient, turned may be
// null too.
struct FusedGradients {
  const void* out_gradient;  // [N, H'/2, W'/2, K]
  const float* statistics;   // [N, 2, K], of the forward
  void* x_gradient;          // [N, H, W, C]
  void* conv_gradient;       // [N, H', W', K], for a weight gradient
  float* norm_gradients;     // [N, 2, K]: each image's part of those of weight and bias
};

// The convolution is computed anew: nothing but x and the statistics is kept of the forward.
int conv_block_backward_launch(const FusedBlock& block, const void* x, const void* packed,
                               const void* turned, const FusedNorm& norm,
                               const FusedGradients& gradients, void* stream);

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// The kernels of thin blocks: see conv_block_cuda.h, which says what is taken.
#pragma once

#include "conv_block_cuda.h"

namespace dmfast {

constexpr int64_t kThinBlockChannels = 4;
constexpr int kThinFilters = 32;  // a chunk of packed weights, which is a warp's

// The length of a product, 9 to a channel, filled up to a multiple of 16.
inline int thin_block_depth(const FusedBlock& block) {
  return static_cast<int>((9 * block.channels + 15) / 16 * 16);
}

int thin_block_shared_bytes(const FusedBlock& block, bool backward);

int thin_block_forward(const FusedBlock& block, const void* x, const void* packed,
                       const FusedNorm& norm, void* out, float* statistics, void* stream);

int thin_block_backward(const FusedBlock& block, const void* x, const void* packed,
                        const void* turned, const FusedNorm& norm, const FusedGradients& gradients,
                        void* stream);

}  // namespace dmfast

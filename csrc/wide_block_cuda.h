// SPDX-License-Identifier: MIT
// The kernels of wide blocks: see conv_block_cuda.h, which says what is taken.
#pragma once

#include "conv_block_cuda.h"

namespace dmfast {

constexpr int kWideFilters = 64;  // a chunk of packed weights: [9][channels / 8][64 filters][8]

// Bytes of shared memory for so many filters a block, 64 or 128.
int wide_block_shared_bytes(const FusedBlock& block, int filters_of_block, bool backward);

int wide_block_forward(const FusedBlock& block, const void* x, const void* packed,
                       const FusedNorm& norm, void* out, float* statistics, void* stream);

// By wgmma, where conv_block_wgmma says so.
bool wide_block_wgmma(const FusedBlock& block);
int wide_block_forward_wgmma(const FusedBlock& block, const void* x, const void* packed,
                             const FusedNorm& norm, void* out, float* statistics, void* stream);

int wide_block_backward(const FusedBlock& block, const void* x, const void* packed,
                        const void* turned, const FusedNorm& norm, const FusedGradients& gradients,
                        void* stream);

}  // namespace dmfast

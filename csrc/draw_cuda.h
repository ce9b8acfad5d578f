// SPDX-License-Identifier: MIT
// The kernels that draw, over raw pointers to the device's memory. Each launch gives a CUDA error
// code, 0 for none.
#pragma once

#include <cstdint>

#include "clamped_groups.h"
#include "draw.h"
#include "dtype.h"

namespace dmfast {

// The key of a draw whose step may be known on the device alone. Such a step is read when the
// kernel runs, so that a captured graph draws anew at each replay; its low 32 bits count.
struct DeviceDraw {
  Draw draw;
  const int64_t* step;  // or null: that of draw

  DMFAST_HD Draw read() const {
    Draw now = draw;
    if (step) now.step = static_cast<uint32_t>(*step);
    return now;
  }
};

constexpr int kMostWords = 64;

struct Strategy {
  unsigned char word[kMostWords];
  int count;
  bool all;
};

int draw_augmentation_launch(const DeviceDraw& draw, const Strategy& strategy,
                             const AugmentationRanges& range, int64_t groups, int64_t rows,
                             uint32_t first_group, float* params, void* stream);

// Rows that offsets leave in no class, or whose class has no images, get 0; rows beyond the size of
// their class begin again with its first.
int draw_batch_launch(const DeviceDraw& draw, const int64_t* order, const ClampedGroups& images,
                      const ClampedGroups& batch, uint32_t first_class, int64_t* index,
                      void* stream);

// One tensor of a network, [networks, elements].
struct Weights {
  void* data;
  DType dtype;
  float bound;
  int64_t elements;
  uint32_t first_block;  // of four elements: where its numbers start among the network's
};

constexpr int kMostTensors = 32;  // a launch

int draw_weights_launch(const DeviceDraw& draw, const Weights* tensors, int count, int64_t networks,
                        uint32_t first_network, void* stream);

}  // namespace dmfast

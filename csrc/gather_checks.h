// SPDX-License-Identifier: MIT
// What the operators that pick, normalise and augment images have in common.
#pragma once

#include <optional>
#include <vector>

#include "check.h"
#include "images.h"

namespace dmfast {

// The arguments of a gathering, checked; they point into the tensors.
struct Gathering {
  Images images;
  int64_t image_count;
  const int64_t* index;
  int64_t count;  // of the index
  ImageSize size;
  Rows rows;
  const float *mean, *std;
  std::vector<float> lookup;  // on the CPU, where the images are bytes

  Normalisation normalisation() const { return {lookup.data(), mean, std}; }
};

// images [M, H, W, C], index [N], params [G, 13], mean [C], std [C], offsets [G + 1]
Gathering checked_gathering(const char* op, const Tensor& images, const Tensor& index,
                            const Tensor& params, const Tensor& mean, const Tensor& std,
                            const std::optional<Tensor>& offsets);

}  // namespace dmfast

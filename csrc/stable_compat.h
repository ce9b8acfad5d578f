// SPDX-License-Identifier: MIT
// What torch's stable ABI lacks. Each shim says when it can go.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <vector>

namespace dmfast {

// Tensor::is_contiguous() takes no memory format; goes when it does.
inline bool is_channels_last(const torch::stable::Tensor& x) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// empty() wants every option spelled out; goes when new_empty() takes a memory format.
inline torch::stable::Tensor new_images(const torch::stable::Tensor& like,
                                        const std::vector<int64_t>& sizes,
                                        torch::headeronly::ScalarType dtype, bool channels_last) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// What the operators that are made of ConvNet blocks check alike.
#pragma once

#include <algorithm>

#include "check.h"
#include "conv_block.h"
#include "stable_compat.h"

namespace dmfast {

// The block of a weight [.., filters, channels, 3, 3] on images of that shape.
inline ConvBlock checked_block(const char* op, const char* argument, const Tensor& conv_weight,
                               int64_t channels, int64_t height, int64_t width, int64_t padding,
                               bool bfloat16) {
  const int64_t last = conv_weight.dim();
  check(last >= 4 && conv_weight.size(last - 1) == 3 && conv_weight.size(last - 2) == 3, op, ": ",
        argument, " must have shape [filters, channels, 3, 3], got ", shape(conv_weight));
  check_dtype(op, argument, conv_weight, ScalarType::Float);
  check(conv_weight.size(last - 3) == channels, op, ": ", argument, " must have ", channels,
        " channels as its input has, got ", conv_weight.size(last - 3));
  const ConvBlock block{channels, conv_weight.size(last - 4), height, width, padding, bfloat16};
  check((block.thin() && channels > 0) || channels % kChannelStep == 0, op,
        ": channels must be 1 to 4 or a multiple of 16, got ", channels);
  check(block.filters > 0 && block.filters % kChannelStep == 0, op,
        ": filters must be a multiple of 16, got ", block.filters);
  check(padding >= 0 && padding <= 8, op, ": padding must be from 0 to 8, got ", padding);
  check(height > 0 && width > 0 && block.conv_height() >= 2 && block.conv_width() >= 2, op,
        ": images of ", height, "x", width, " are too small for a padding of ", padding,
        " and pooling");
  // So that no product of theirs passes 64 bits, which an expanded tensor's may.
  const double elements = static_cast<double>(block.conv_height()) *
                          static_cast<double>(block.conv_width()) *
                          static_cast<double>(std::max(channels, block.filters));
  check(elements < 0x1p48, op, ": no memory for images of ", height, "x", width, " with ",
        block.filters, " filters");
  return block;
}

// torch::stable::contiguous() alone would make it NCHW.
inline Tensor dense_channels_last(const char* op, const Tensor& x) {
  if (is_channels_last(x)) return x;
  return allocated(op, sizes_of(x), [&] {
    return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
  });
}

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// What the loops of augment_loops.h need to know of a row of parameters: made once for all images
// that share it, in ordinary code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "augment.h"
#include "images.h"

namespace dmfast {

// An image as the loops see it: planes of height rows of width pixels of so many adjacent values.
// NCHW has a plane for each channel, channels_last one plane of pixels that hold all channels.
struct Layout {
  int64_t planes, height, width, adjacent;

  static Layout of(ImageSize size, bool channels_last) {
    return channels_last ? Layout{1, size.height, size.width, size.channels}
                         : Layout{size.channels, size.height, size.width, 1};
  }
  bool channels_last() const { return planes == 1 && adjacent > 1; }
  int64_t channels() const { return planes * adjacent; }
  int64_t pixels() const { return height * width; }
  int64_t numel() const { return pixels() * channels(); }
};

// Crop, cutout and flip as copies of rows: output pixel (y, x) is source pixel (y + down,
// first + x), or first - x where it is mirrored, for top <= y < bottom and left <= x < right;
// outside of these and inside the hole it is 0.
struct RowCopies {
  int64_t down, first;
  bool mirrored;
  int64_t top, bottom, left, right;
  int64_t hole_top, hole_bottom, hole_left, hole_right;
  // For each element of a row -1 where it is kept and 0 where not: of rows beside the hole (empty
  // where all of it is kept), and of rows through it.
  std::vector<int8_t> keep, keep_beside_hole;

  void make(const float* params, const Layout& layout, bool adjoint);
  bool is_identity = true;
};

// A linear map of pixels: pixel p of the output is the sum of weight[t] times pixel source[t] of
// the input over starts[p] <= t < starts[p + 1], the same for every channel and image. Terms
// without weight are left out, so that an infinite pixel stays where it is. The adjoint is the
// same map transposed, to the bit.
template <typename acc_t>
struct PixelMap {
  struct Term {
    int32_t source;
    acc_t weight;
  };
  std::vector<int32_t> starts;
  std::vector<Term> terms;

  void make(const Warp<acc_t, int32_t>& warp);
  void transpose();

 private:
  // The two pixels beside a sample in one direction; without weight where there is none.
  struct Pair {
    std::vector<int32_t> first;
    std::vector<acc_t> source, weight, next_weight;
    void find(int32_t size);
  };
  Pair rows_, columns_;  // of a row of the output
  std::vector<int32_t> next_;
  std::vector<Term> spare_;
};

// So many pixels have at most 2^31 terms.
constexpr int64_t kMostPixels = int64_t{1} << 29;

template <typename acc_t>
struct Plan {
  float params[kColumns] = {};
  Layout layout{};
  bool adjoint = false;

  bool identity = true, colors = false, shifts = false, scales = false, rotates = false;
  acc_t brightness, saturation, contrast;
  RowCopies copies;
  PixelMap<acc_t> scale, rotate;

  bool warps() const { return scales || rotates; }

  // Does nothing where it is the plan of these already.
  void make(const float* row, const Layout& of_image, bool is_adjoint);
};

// Memory on a cache line, of which the contents are lost when it grows.
template <typename T>
class Buffer {
 public:
  T* at_least(size_t count) {
    if (count > count_) {
      data_.reset();
      data_.reset(static_cast<T*>(::operator new(count * sizeof(T), kLine)));
      for (size_t i = 0; i < count; ++i) data_.get()[i] = T(0);
      count_ = count;
    }
    return data_.get();
  }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Delete> data_;
  size_t count_ = 0;
};

// What a thread works with.
template <typename acc_t>
struct Workspace {
  Plan<acc_t> plan;
  Buffer<acc_t> images, lanes;

  // That of the thread. It is kept from call to call, so that calls for a few images each, one
  // after another, neither allocate nor make the plan of one class again.
  static Workspace& mine();
  // Lets go of memory that is too large to keep.
  void trim();
};

}  // namespace dmfast

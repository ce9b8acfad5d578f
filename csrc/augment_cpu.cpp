// SPDX-License-Identifier: MIT
#include "augment_cpu.h"

#include <algorithm>
#include <memory>

#include "augment.h"
#include "cpu_types.h"

namespace dmfast {
namespace {

// An image in the accumulation type. Pixel p of channel c is at data[p * pixel + c * channel]:
// either layout, so that an image is read and written in the order in which it lies in memory.
template <typename acc_t>
struct Scratch {
  acc_t* data;
  ImageSize size;
  int64_t pixel, channel;

  int64_t pixels() const { return size.height * size.width; }
  int64_t numel() const { return pixels() * size.channels; }
  acc_t* at(int64_t p) const { return data + p * pixel; }
};

// Two images that a chain of transforms is passed back and forth between.
template <typename acc_t>
class Buffers {
 public:
  Buffers(ImageSize size, bool channels_last)
      : storage_(new acc_t[2 * size.channels * size.height * size.width]) {
    const int64_t pixels = size.height * size.width;
    for (int i = 0; i < 2; ++i) {
      buffer_[i] = {storage_.get() + i * pixels * size.channels, size,
                    channels_last ? size.channels : 1, channels_last ? 1 : pixels};
    }
  }

  const Scratch<acc_t>& image() const { return buffer_[current_]; }

  // Makes every pixel anew: compute(y, x, from, to) fills its channels, and to is zero.
  template <typename Compute>
  void transform(const Compute& compute) {
    const Scratch<acc_t>&from = buffer_[current_], &to = buffer_[1 - current_];
    std::fill_n(to.data, to.numel(), acc_t(0));
    for (int64_t y = 0, p = 0; y < from.size.height; ++y) {
      for (int64_t x = 0; x < from.size.width; ++x, ++p) compute(y, x, from, to.at(p));
    }
    current_ = 1 - current_;
  }

 private:
  std::unique_ptr<acc_t[]> storage_;
  Scratch<acc_t> buffer_[2];
  int current_ = 0;
};

template <typename acc_t>
void add_weighted(const Scratch<acc_t>& from, int64_t y, int64_t x, acc_t weight, acc_t* to) {
  const acc_t* source = from.at(y * from.size.width + x);
  for (int64_t c = 0; c < from.size.channels; ++c) {
    to[c * from.channel] += weight * source[c * from.channel];
  }
}

template <typename acc_t>
double image_mean(const Scratch<acc_t>& image) {
  double sum = 0;
  for (int64_t i = 0; i < image.numel(); ++i) sum += image.data[i];
  return sum / static_cast<double>(image.numel());
}

template <typename acc_t>
acc_t channel_mean(const Scratch<acc_t>& image, const acc_t* pixel) {
  acc_t sum = 0;
  for (int64_t c = 0; c < image.size.channels; ++c) sum += pixel[c * image.channel];
  return sum / static_cast<acc_t>(image.size.channels);
}

template <typename acc_t>
void apply_color(const Color<acc_t>& color, const Scratch<acc_t>& image) {
  if (color.brightens()) {
    for (int64_t i = 0; i < image.numel(); ++i) image.data[i] += color.brightness;
  }
  if (color.saturates()) {
    for (int64_t p = 0; p < image.pixels(); ++p) {
      acc_t* pixel = image.at(p);
      const acc_t mean = channel_mean(image, pixel);
      for (int64_t c = 0; c < image.size.channels; ++c) {
        pixel[c * image.channel] = about(pixel[c * image.channel], mean, color.saturation);
      }
    }
  }
  if (color.contrasts()) {
    const acc_t mean = static_cast<acc_t>(image_mean(image));
    for (int64_t i = 0; i < image.numel(); ++i) {
      image.data[i] = about(image.data[i], mean, color.contrast);
    }
  }
}

template <typename acc_t>
void apply_color_adjoint(const Color<acc_t>& color, const Scratch<acc_t>& image) {
  if (color.contrasts()) {
    const acc_t mean = static_cast<acc_t>(image_mean(image));
    for (int64_t i = 0; i < image.numel(); ++i) {
      image.data[i] = about_adjoint(image.data[i], mean, color.contrast);
    }
  }
  if (color.saturates()) {
    for (int64_t p = 0; p < image.pixels(); ++p) {
      acc_t* pixel = image.at(p);
      const acc_t mean = channel_mean(image, pixel);
      for (int64_t c = 0; c < image.size.channels; ++c) {
        pixel[c * image.channel] = about_adjoint(pixel[c * image.channel], mean, color.saturation);
      }
    }
  }
}

template <typename acc_t>
void apply_shift(const Shift<>& shift, bool adjoint, Buffers<acc_t>& buffers) {
  if (shift.is_identity()) return;
  buffers.transform([&](int64_t y, int64_t x, const Scratch<acc_t>& from, acc_t* to) {
    if (!(adjoint ? shift.target(&y, &x) : shift.source(&y, &x))) return;
    const acc_t* source = from.at(y * from.size.width + x);
    for (int64_t c = 0; c < from.size.channels; ++c)
      to[c * from.channel] = source[c * from.channel];
  });
}

template <typename acc_t>
void apply_warp(const Warp<acc_t>& warp, bool adjoint, Buffers<acc_t>& buffers) {
  buffers.transform([&](int64_t y, int64_t x, const Scratch<acc_t>& from, acc_t* to) {
    const auto add = [&](int64_t source_y, int64_t source_x, acc_t weight) {
      add_weighted(from, source_y, source_x, weight, to);
    };
    adjoint ? warp.targets(y, x, add) : warp.sources(y, x, add);
  });
}

template <typename acc_t>
void augment(const float* params, Buffers<acc_t>& buffers) {
  const ImageSize size = buffers.image().size;
  apply_color(Color<acc_t>(params), buffers.image());
  apply_shift(Shift<>(params, size.height, size.width), false, buffers);
  if (params[kScaleX] != 1.0f || params[kScaleY] != 1.0f) {
    apply_warp(Warp<acc_t>::scale(params, size.height, size.width), false, buffers);
  }
  if (params[kAngle] != 0.0f) {
    apply_warp(Warp<acc_t>::rotate(params, size.height, size.width), false, buffers);
  }
}

template <typename acc_t>
void augment_adjoint(const float* params, Buffers<acc_t>& buffers) {
  const ImageSize size = buffers.image().size;
  if (params[kAngle] != 0.0f) {
    apply_warp(Warp<acc_t>::rotate(params, size.height, size.width), true, buffers);
  }
  if (params[kScaleX] != 1.0f || params[kScaleY] != 1.0f) {
    apply_warp(Warp<acc_t>::scale(params, size.height, size.width), true, buffers);
  }
  apply_shift(Shift<>(params, size.height, size.width), true, buffers);
  apply_color_adjoint(Color<acc_t>(params), buffers.image());
}

// Calls visit(c, y, x, scratch element) in the order in which the scratch lies in memory.
template <typename acc_t, typename Visit>
void for_each_element(const Scratch<acc_t>& image, const Visit& visit) {
  const ImageSize size = image.size;
  if (image.channel == 1) {
    for (int64_t y = 0, i = 0; y < size.height; ++y) {
      for (int64_t x = 0; x < size.width; ++x) {
        for (int64_t c = 0; c < size.channels; ++c, ++i) visit(c, y, x, image.data[i]);
      }
    }
  } else {
    for (int64_t c = 0, i = 0; c < size.channels; ++c) {
      for (int64_t y = 0; y < size.height; ++y) {
        for (int64_t x = 0; x < size.width; ++x, ++i) visit(c, y, x, image.data[i]);
      }
    }
  }
}

template <typename T, typename acc_t>
void store(const Scratch<acc_t>& image, const Images& y, int64_t n) {
  T* to = static_cast<T*>(y.data) + n * y.sn;
  for_each_element(image, [&](int64_t c, int64_t row, int64_t column, acc_t value) {
    to[c * y.sc + row * y.sy + column * y.sx] = static_cast<T>(value);
  });
}

template <typename T, typename Transform>
void map_images(const Images& x, const Images& y, ImageSize size, const Rows& rows, int64_t begin,
                int64_t end, const Transform& transform) {
  using acc_t = typename Accumulator<T>::type;
  for (int64_t n = begin; n < end; ++n) {
    const T* from = static_cast<const T*>(x.data) + n * x.sn;
    if (is_identity_row(rows.of(n))) {  // not by way of acc_t, which loses the bits of some NaN
      T* to = static_cast<T*>(y.data) + n * y.sn;
      for (int64_t c = 0; c < size.channels; ++c) {
        for (int64_t row = 0; row < size.height; ++row) {
          for (int64_t column = 0; column < size.width; ++column) {
            to[c * y.sc + row * y.sy + column * y.sx] = from[c * x.sc + row * x.sy + column * x.sx];
          }
        }
      }
      continue;
    }
    Buffers<acc_t> buffers(size, y.sc == 1 && size.channels > 1);
    for_each_element(buffers.image(), [&](int64_t c, int64_t row, int64_t column, acc_t& value) {
      value = static_cast<acc_t>(from[c * x.sc + row * x.sy + column * x.sx]);
    });
    transform(rows.of(n), buffers);
    store<T>(buffers.image(), y, n);
  }
}

}  // namespace

const float* Rows::of(int64_t image) const {
  const int64_t group = offsets
                            ? std::upper_bound(offsets + 1, offsets + groups, image) - offsets - 1
                            : image / (images / groups);
  return params + group * kColumns;
}

void siamese_augment_range(const Images& x, const Images& y, ImageSize size, const Rows& rows,
                           int64_t begin, int64_t end) {
  with_dtype(x.dtype, [&](auto element) {
    map_images<decltype(element)>(x, y, size, rows, begin, end,
                                  [](const float* row, auto& buffers) { augment(row, buffers); });
  });
}

void siamese_augment_backward_range(const Images& y_gradient, const Images& x_gradient,
                                    ImageSize size, const Rows& rows, int64_t begin, int64_t end) {
  with_dtype(y_gradient.dtype, [&](auto element) {
    map_images<decltype(element)>(
        y_gradient, x_gradient, size, rows, begin, end,
        [](const float* row, auto& buffers) { augment_adjoint(row, buffers); });
  });
}

void gather_augment_range(const Images& images, const int64_t* index,
                          const Normalisation& normalisation, const Images& y, ImageSize size,
                          const Rows& rows, int64_t begin, int64_t end) {
  with_dtype(y.dtype, [&](auto element) {
    using T = decltype(element);
    using acc_t = typename Accumulator<T>::type;
    for (int64_t n = begin; n < end; ++n) {
      Buffers<acc_t> buffers(size, size.channels > 1);
      const int64_t start = index[n] * images.sn;
      if (images.dtype == DType::kUInt8) {
        const uint8_t* from = static_cast<const uint8_t*>(images.data) + start;
        for_each_element(
            buffers.image(), [&](int64_t c, int64_t row, int64_t column, acc_t& value) {
              const uint8_t byte = from[c * images.sc + row * images.sy + column * images.sx];
              value = normalisation.lookup[c * 256 + byte];
            });
      } else {
        const float* from = static_cast<const float*>(images.data) + start;
        for_each_element(
            buffers.image(), [&](int64_t c, int64_t row, int64_t column, acc_t& value) {
              const float pixel = from[c * images.sc + row * images.sy + column * images.sx];
              value = (pixel - normalisation.mean[c]) / normalisation.std[c];
            });
      }
      augment(rows.of(n), buffers);
      store<T>(buffers.image(), y, n);
    }
  });
}

}  // namespace dmfast

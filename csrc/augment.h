// SPDX-License-Identifier: MIT
// The six transforms of differentiable Siamese augmentation (Zhao and Bilen, ICML 2021) and their
// adjoints, per pixel: no torch, no CUDA header. A row of the parameter table says what is applied
// to an image; columns at their identity value change no bit of it.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace dmfast {

// ---- The table ---------------------------------------------------------------------------------

// The columns of a row, in the order in which they are applied.
enum Column : int {
  kBrightness,  // b [0]: x + b
  kSaturation,  // s [1]: (x - m) s + m, m the mean over the channels at each pixel
  kContrast,    // c [1]: (x - M) c + M, M the mean of the image after brightness and saturation
  kCropY,       // dy, dx [0]: out(y, x) = in(y + dy, x + dx), 0 outside
  kCropX,
  kCutTop,  // top, left, height, width [0]: zeroed; clipped at the borders
  kCutLeft,
  kCutHeight,
  kCutWidth,
  kFlip,    // [0]: 1 mirrors x
  kScaleX,  // sx, sy [1]: bilinear, source = (x - centre) sx + centre, 0 outside
  kScaleY,
  kAngle,  // a [0]: radians, in coordinates scaled to [-1, 1] in both directions; bilinear
  kColumns
};

DMFAST_HD void identity_row(float* params) {
  for (int i = 0; i < kColumns; ++i) params[i] = 0.0f;
  params[kSaturation] = params[kContrast] = params[kScaleX] = params[kScaleY] = 1.0f;
}

DMFAST_HD bool is_identity_row(const float* params) {
  float identity[kColumns];
  identity_row(identity);
  bool same = true;
  for (int i = 0; i < kColumns; ++i) same = same && params[i] == identity[i];
  return same;
}

template <typename index_t>
DMFAST_HD index_t to_pixels(float value) {
  // Far beyond any image is as good as any farther; NaN becomes 0.
  const float limit = 1e9f;
  if (!(value > -limit)) return value < 0 ? static_cast<index_t>(-limit) : 0;
  return static_cast<index_t>(value < limit ? std::nearbyint(value) : limit);
}

// ---- Color -------------------------------------------------------------------------------------

template <typename acc_t>
struct Color {
  acc_t brightness, saturation, contrast;

  DMFAST_HD explicit Color(const float* params)
      : brightness(params[kBrightness]),
        saturation(params[kSaturation]),
        contrast(params[kContrast]) {}

  DMFAST_HD bool brightens() const { return brightness != acc_t(0); }
  DMFAST_HD bool saturates() const { return saturation != acc_t(1); }
  DMFAST_HD bool contrasts() const { return contrast != acc_t(1); }
};

// Moves x about a mean by a factor: saturation about the pixel's, contrast about the image's.
template <typename acc_t>
DMFAST_HD acc_t about(acc_t x, acc_t mean, acc_t factor) {
  return (x - mean) * factor + mean;
}

// The adjoint: each element of the mean sends back its share of what the factor does not keep.
template <typename acc_t>
DMFAST_HD acc_t about_adjoint(acc_t gradient, acc_t mean_gradient, acc_t factor) {
  return gradient * factor + mean_gradient * (acc_t(1) - factor);
}

// ---- Crop, cutout, flip: each output pixel has one source or none ------------------------------

// index_t holds coordinates: 32 bits are enough, and faster on a GPU, for sides below kLargestSide.
constexpr int64_t kLargestSide = int64_t{1} << 30;

template <typename index_t = int64_t>
struct Shift {
  index_t height, width;
  index_t crop_y, crop_x, cut_top, cut_left, cut_bottom, cut_right;
  bool flip;

  DMFAST_HD Shift(const float* params, index_t image_height, index_t image_width)
      : height(image_height),
        width(image_width),
        crop_y(to_pixels<index_t>(params[kCropY])),
        crop_x(to_pixels<index_t>(params[kCropX])),
        cut_top(to_pixels<index_t>(params[kCutTop])),
        cut_left(to_pixels<index_t>(params[kCutLeft])),
        cut_bottom(cut_top + to_pixels<index_t>(params[kCutHeight])),
        cut_right(cut_left + to_pixels<index_t>(params[kCutWidth])),
        flip(params[kFlip] != 0.0f) {}

  DMFAST_HD bool is_identity() const {
    const bool cuts = cut_bottom > cut_top && cut_right > cut_left;
    return crop_y == 0 && crop_x == 0 && !cuts && !flip;
  }

  // Takes output pixel (y, x) to its source; false where it has none and the output is 0.
  DMFAST_HD bool source(index_t* y, index_t* x) const {
    if (flip) *x = width - 1 - *x;
    if (cut(*y, *x)) return false;
    *y += crop_y;
    *x += crop_x;
    return inside(*y, *x);
  }

  // Takes source pixel (y, x) to the one output pixel that reads it; false where none does.
  DMFAST_HD bool target(index_t* y, index_t* x) const {
    *y -= crop_y;
    *x -= crop_x;
    if (cut(*y, *x) || !inside(*y, *x)) return false;
    if (flip) *x = width - 1 - *x;
    return true;
  }

 private:
  DMFAST_HD bool cut(index_t y, index_t x) const {
    return y >= cut_top && y < cut_bottom && x >= cut_left && x < cut_right;
  }
  DMFAST_HD bool inside(index_t y, index_t x) const {
    return y >= 0 && y < height && x >= 0 && x < width;
  }
};

// ---- Scale and rotate: bilinear samples under a linear map about the image's centre ------------

// Weight of a sample at distance d: the one expression that forward and adjoint share, so that the
// one is the exact transpose of the other.
template <typename acc_t>
DMFAST_HD acc_t tent(acc_t d) {
  const acc_t weight = acc_t(1) - (d < acc_t(0) ? -d : d);
  return weight > acc_t(0) ? weight : acc_t(0);  // NaN: 0
}

template <typename index_t>
struct Range {  // first <= i < last
  index_t first, last;

  static DMFAST_HD Range one(index_t i) { return Range{i, i + 1}; }

  // The integers i with |i - centre| < 1, in [0, size).
  template <typename acc_t>
  static DMFAST_HD Range beside(acc_t centre, index_t size) {
    // Also empty for NaN: such a pixel is made of nothing.
    if (!(centre > acc_t(-1) && centre < acc_t(size))) return Range{0, 0};
    const index_t low = static_cast<index_t>(std::floor(centre));
    return Range{low < 0 ? 0 : low, low + 2 < size ? low + 2 : size};
  }

  // The integers within `reach` of `centre` (and a little more, against rounding), in [0, size).
  template <typename acc_t>
  static DMFAST_HD Range within(acc_t centre, acc_t reach, index_t size) {
    const acc_t slack = acc_t(1) / acc_t(64);
    const acc_t low = std::ceil(centre - reach - slack), high = std::floor(centre + reach + slack);
    // Written so that NaN and infinity, from a map that cannot be inverted, take the whole range.
    return Range{
        low > acc_t(0) ? (low < acc_t(size) ? static_cast<index_t>(low) : size) : 0,
        high < acc_t(size - 1) ? (high >= acc_t(0) ? static_cast<index_t>(high) + 1 : 0) : size};
  }
};

template <typename acc_t, typename index_t = int64_t>
struct Warp {
  index_t height, width;
  acc_t centre_y, centre_x;
  acc_t xx, xy, yx, yy;      // source = matrix (output - centre) + centre, in pixels
  acc_t ixx, ixy, iyx, iyy;  // and its inverse

  Warp() = default;

  // Factors sx and sy: the source of output x is (x + .5 - W/2) sx + W/2 - .5.
  static DMFAST_HD Warp scale(const float* params, index_t height, index_t width) {
    return Warp(params[kScaleX], 0, 0, params[kScaleY], height, width);
  }

  // u cos a - v sin a, u sin a + v cos a with u = (2x + 1)/W - 1 and v = (2y + 1)/H - 1.
  static DMFAST_HD Warp rotate(const float* params, index_t height, index_t width) {
    const double c = std::cos(static_cast<double>(params[kAngle]));
    const double s = std::sin(static_cast<double>(params[kAngle]));
    const double aspect = static_cast<double>(width) / static_cast<double>(height);
    return Warp(c, -s * aspect, s / aspect, c, height, width);
  }

  // Where output pixel (y, x) samples.
  DMFAST_HD void source(index_t y, index_t x, acc_t* source_y, acc_t* source_x) const {
    const acc_t dy = acc_t(y) - centre_y, dx = acc_t(x) - centre_x;
    *source_y = yx * dx + yy * dy + centre_y;
    *source_x = xx * dx + xy * dy + centre_x;
  }

  // Calls visit(y, x, weight) for each pixel inside the image that output pixel (y, x) is made of:
  // four at most. A map that is not `used` is the identity, by the same code: a GPU then has one
  // loop for every image.
  template <typename Visit>
  DMFAST_HD void sources(index_t y, index_t x, const Visit& visit, bool used = true) const {
    acc_t sy = acc_t(y), sx = acc_t(x);
    Range<index_t> rows = Range<index_t>::one(y), columns = Range<index_t>::one(x);
    if (used) {
      source(y, x, &sy, &sx);
      rows = Range<index_t>::beside(sy, height);
      columns = Range<index_t>::beside(sx, width);
    }
    DMFAST_ROLLED
    for (index_t py = rows.first; py < rows.last; ++py) {
      const acc_t weight_y = tent(sy - acc_t(py));
      DMFAST_ROLLED
      for (index_t px = columns.first; px < columns.last; ++px) {
        // Without weight a pixel is no part of the sum, even where it is infinite.
        const acc_t weight = weight_y * tent(sx - acc_t(px));
        if (weight > acc_t(0)) visit(py, px, weight);
      }
    }
  }

  // Calls visit(y, x, weight) for each output pixel that source pixel (y, x) goes into: the
  // adjoint by gathering, in a fixed order. The candidates are those whose source can lie within
  // one pixel of (y, x): the bounding box of that square under the inverse map.
  template <typename Visit>
  DMFAST_HD void targets(index_t y, index_t x, const Visit& visit, bool used = true) const {
    Range<index_t> rows = Range<index_t>::one(y), columns = Range<index_t>::one(x);
    if (used) {
      const acc_t dy = acc_t(y) - centre_y, dx = acc_t(x) - centre_x;
      rows = Range<index_t>::within(iyx * dx + iyy * dy + centre_y, std::fabs(iyx) + std::fabs(iyy),
                                    height);
      columns = Range<index_t>::within(ixx * dx + ixy * dy + centre_x,
                                       std::fabs(ixx) + std::fabs(ixy), width);
    }
    DMFAST_ROLLED
    for (index_t ty = rows.first; ty < rows.last; ++ty) {
      DMFAST_ROLLED
      for (index_t tx = columns.first; tx < columns.last; ++tx) {
        acc_t sy = acc_t(y), sx = acc_t(x);
        if (used) source(ty, tx, &sy, &sx);
        const acc_t weight = tent(sy - acc_t(y)) * tent(sx - acc_t(x));
        if (weight > acc_t(0)) visit(ty, tx, weight);
      }
    }
  }

 private:
  DMFAST_HD Warp(double a, double b, double c, double d, index_t image_height, index_t image_width)
      : height(image_height),
        width(image_width),
        centre_y(acc_t(image_height - 1) / acc_t(2)),
        centre_x(acc_t(image_width - 1) / acc_t(2)),
        xx(acc_t(a)),
        xy(acc_t(b)),
        yx(acc_t(c)),
        yy(acc_t(d)) {
    // A map without an inverse gives infinities and NaN, which Range turns into the whole image.
    const double determinant = a * d - b * c;
    ixx = acc_t(d / determinant);
    ixy = acc_t(-b / determinant);
    iyx = acc_t(-c / determinant);
    iyy = acc_t(a / determinant);
  }
};

}  // namespace dmfast

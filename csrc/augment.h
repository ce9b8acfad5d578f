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

DMFAST_HD int64_t to_pixels(float value) {
  // Far beyond any image is as good as any farther; NaN becomes 0.
  const float limit = 1e9f;
  if (!(value > -limit)) return value < 0 ? static_cast<int64_t>(-limit) : 0;
  return static_cast<int64_t>(value < limit ? std::nearbyint(value) : limit);
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

// ---- Crop, cutout, flip: each output pixel has one source or none
// --------------------------------

struct Shift {
  int64_t height, width;
  int64_t crop_y, crop_x, cut_top, cut_left, cut_bottom, cut_right;
  bool flip;

  DMFAST_HD Shift(const float* params, int64_t image_height, int64_t image_width)
      : height(image_height),
        width(image_width),
        crop_y(to_pixels(params[kCropY])),
        crop_x(to_pixels(params[kCropX])),
        cut_top(to_pixels(params[kCutTop])),
        cut_left(to_pixels(params[kCutLeft])),
        cut_bottom(cut_top + to_pixels(params[kCutHeight])),
        cut_right(cut_left + to_pixels(params[kCutWidth])),
        flip(params[kFlip] != 0.0f) {}

  DMFAST_HD bool is_identity() const {
    const bool cuts = cut_bottom > cut_top && cut_right > cut_left;
    return crop_y == 0 && crop_x == 0 && !cuts && !flip;
  }

  // Index (y * width + x) of the source of output pixel (y, x), or -1 where the output is 0.
  DMFAST_HD int64_t source(int64_t y, int64_t x) const {
    if (flip) x = width - 1 - x;
    if (y >= cut_top && y < cut_bottom && x >= cut_left && x < cut_right) return -1;
    return inside(y + crop_y, x + crop_x);
  }

  // Index of the one output pixel that reads source pixel (y, x), or -1: the adjoint's source.
  DMFAST_HD int64_t target(int64_t y, int64_t x) const {
    y -= crop_y;
    x -= crop_x;
    if (y >= cut_top && y < cut_bottom && x >= cut_left && x < cut_right) return -1;
    return inside(y, flip ? width - 1 - x : x);
  }

 private:
  DMFAST_HD int64_t inside(int64_t y, int64_t x) const {
    return y >= 0 && y < height && x >= 0 && x < width ? y * width + x : -1;
  }
};

// ---- Scale and rotate: bilinear samples under a linear map about the image's centre
// --------------

// Weight of a sample at distance d: the one expression that forward and adjoint share, so that the
// one is the exact transpose of the other.
template <typename acc_t>
DMFAST_HD acc_t tent(acc_t d) {
  const acc_t weight = acc_t(1) - (d < acc_t(0) ? -d : d);
  return weight > acc_t(0) ? weight : acc_t(0);  // NaN: 0
}

template <typename acc_t>
struct Range {  // first <= i < last
  int64_t first, last;

  // The integers within `reach` of `centre` (and a little more, against rounding), in [0, size).
  DMFAST_HD Range(acc_t centre, acc_t reach, int64_t size) {
    const acc_t slack = acc_t(1) / acc_t(64);
    const acc_t low = std::ceil(centre - reach - slack), high = std::floor(centre + reach + slack);
    // Written so that NaN and infinity, from a map that cannot be inverted, take the whole range.
    first = low > acc_t(0) ? (low < acc_t(size) ? static_cast<int64_t>(low) : size) : 0;
    last = high < acc_t(size - 1) ? (high >= acc_t(0) ? static_cast<int64_t>(high) + 1 : 0) : size;
  }
};

template <typename acc_t>
struct Warp {
  int64_t height, width;
  acc_t centre_y, centre_x;
  acc_t xx, xy, yx, yy;      // source = matrix (output - centre) + centre, in pixels
  acc_t ixx, ixy, iyx, iyy;  // and its inverse

  // Factors sx and sy: the source of output x is (x + .5 - W/2) sx + W/2 - .5.
  static DMFAST_HD Warp scale(const float* params, int64_t height, int64_t width) {
    return Warp(params[kScaleX], 0, 0, params[kScaleY], height, width);
  }

  // u cos a - v sin a, u sin a + v cos a with u = (2x + 1)/W - 1 and v = (2y + 1)/H - 1.
  static DMFAST_HD Warp rotate(const float* params, int64_t height, int64_t width) {
    const double c = std::cos(static_cast<double>(params[kAngle]));
    const double s = std::sin(static_cast<double>(params[kAngle]));
    const double aspect = static_cast<double>(width) / static_cast<double>(height);
    return Warp(c, -s * aspect, s / aspect, c, height, width);
  }

  // Where output pixel (y, x) samples.
  DMFAST_HD void source(int64_t y, int64_t x, acc_t* source_y, acc_t* source_x) const {
    const acc_t dy = acc_t(y) - centre_y, dx = acc_t(x) - centre_x;
    *source_y = yx * dx + yy * dy + centre_y;
    *source_x = xx * dx + xy * dy + centre_x;
  }

  // Calls visit(index, weight) for each pixel (index = y * width + x) inside the image that output
  // pixel (y, x) is made of: four at most.
  template <typename Visit>
  DMFAST_HD void sources(int64_t y, int64_t x, const Visit& visit) const {
    acc_t sy, sx;
    source(y, x, &sy, &sx);
    // Also false for NaN: such a pixel is made of nothing.
    if (!(sy > acc_t(-1) && sy < acc_t(height) && sx > acc_t(-1) && sx < acc_t(width))) return;
    const int64_t y0 = static_cast<int64_t>(std::floor(sy));
    const int64_t x0 = static_cast<int64_t>(std::floor(sx));
    for (int64_t py = y0 < 0 ? 0 : y0; py <= y0 + 1 && py < height; ++py) {
      const acc_t weight_y = tent(sy - acc_t(py));
      for (int64_t px = x0 < 0 ? 0 : x0; px <= x0 + 1 && px < width; ++px) {
        // Without weight a pixel is no part of the sum, even where it is infinite.
        const acc_t weight = weight_y * tent(sx - acc_t(px));
        if (weight > acc_t(0)) visit(py * width + px, weight);
      }
    }
  }

  // Calls visit(index, weight) for each output pixel that source pixel (y, x) goes into: the
  // adjoint by gathering, in a fixed order. The candidates are those whose source can lie within
  // one pixel of (y, x): the bounding box of that square under the inverse map.
  template <typename Visit>
  DMFAST_HD void targets(int64_t y, int64_t x, const Visit& visit) const {
    const acc_t dy = acc_t(y) - centre_y, dx = acc_t(x) - centre_x;
    const Range<acc_t> rows(iyx * dx + iyy * dy + centre_y, std::fabs(iyx) + std::fabs(iyy),
                            height);
    const Range<acc_t> columns(ixx * dx + ixy * dy + centre_x, std::fabs(ixx) + std::fabs(ixy),
                               width);
    for (int64_t ty = rows.first; ty < rows.last; ++ty) {
      for (int64_t tx = columns.first; tx < columns.last; ++tx) {
        acc_t sy, sx;
        source(ty, tx, &sy, &sx);
        const acc_t weight = tent(sy - acc_t(y)) * tent(sx - acc_t(x));
        if (weight > acc_t(0)) visit(ty * width + tx, weight);
      }
    }
  }

 private:
  DMFAST_HD Warp(double a, double b, double c, double d, int64_t image_height, int64_t image_width)
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

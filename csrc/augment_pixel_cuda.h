// SPDX-License-Identifier: MIT
// What a thread of the augmentation kernels does for one pixel: where its values come from, and
// their way through the transforms, forward and back. For augment_cuda.cu.
#pragma once

#include <cstdint>
#include <type_traits>

#include "augment.h"
#include "cuda_host.h"
#include "cuda_types.h"

namespace dmfast {

constexpr int kChannels = 4;  // that are in registers at once
constexpr int kLookups = 256;

struct Strides {
  int64_t n, c, y, x;

  __device__ int64_t at(int64_t c0, int row, int column) const {
    return c0 * c + row * y + column * x;
  }
};

// ---- Where pixels come from --------------------------------------------------------------------

template <typename T>
struct Batch {
  using Element = T;
  static constexpr bool kPlain = true, kLooksUp = false;
  const T* data;
  Strides stride;

  // The image that becomes image n of the output.
  __device__ const T* image(int64_t n) const { return data + n * stride.n; }
  __device__ void fill(float*, int) const {}
  template <typename acc_t>
  __device__ acc_t value(T element, int64_t, const float*) const {
    return static_cast<acc_t>(element);
  }
};

template <typename T>  // uint8_t or float
struct Gathered {
  using Element = T;
  static constexpr bool kPlain = false, kLooksUp = std::is_same<T, uint8_t>::value;
  const T* data;
  Strides stride;
  const int64_t* index;
  int64_t images;
  const float *mean, *std;

  __device__ const T* image(int64_t n) const {
    const int64_t pick = index[n];
    return data + (pick < 0 ? 0 : pick < images ? pick : images - 1) * stride.n;
  }
  __device__ float normalised(T element, int64_t c) const {
    const float value = static_cast<float>(element);
    return ((kLooksUp ? value / 255.0f : value) - mean[c]) / std[c];
  }
  // The table saves two divisions for each sample of a byte.
  __device__ void fill(float* table, int channels) const {
    for (int i = static_cast<int>(threadIdx.x); i < channels * kLookups; i += blockDim.x) {
      table[i] = normalised(static_cast<T>(i % kLookups), i / kLookups);
    }
  }
  template <typename acc_t>
  __device__ acc_t value(T element, int64_t c, const float* table) const {
    if (kLooksUp && table) return table[c * kLookups + static_cast<int>(element)];
    return normalised(element, c);
  }
};

// ---- What a block knows of its image -----------------------------------------------------------

enum class Kind : int { kZero, kNaN, kCopy, kTransform };

template <typename acc_t>
struct Plan {
  int64_t image, tile;
  int row, column;  // of the tile's first pixel
  Kind kind;
  bool shifts, scales, rotates;
  Color<acc_t> color;
  Shift<int> shift;
  Warp<acc_t, int> scale, rotate;

  // params: the row of the image, or null.
  __device__ __noinline__ void fill(const float* params, int height, int width) {
    kind = params ? Kind::kTransform : Kind::kZero;
    if (!params) return;
    DMFAST_ROLLED
    for (int i = 0; i < kColumns; ++i) {
      if (params[i] != params[i]) kind = Kind::kNaN;
    }
    if (kind == Kind::kNaN) return;
    if (is_identity_row(params)) kind = Kind::kCopy;
    color = Color<acc_t>(params);
    shift = Shift<int>(params, height, width);
    shifts = !shift.is_identity();
    scales = params[kScaleX] != 1.0f || params[kScaleY] != 1.0f;
    if (scales) scale = Warp<acc_t, int>::scale(params, height, width);
    rotates = params[kAngle] != 0.0f;
    if (rotates) rotate = Warp<acc_t, int>::rotate(params, height, width);
  }

  __device__ bool moves() const { return shifts || scales || rotates; }
};

// ---- A pixel's way through the transforms ------------------------------------------------------

// Up to kChannels values of a pixel, from channel c0 on.
template <typename acc_t>
struct Values {
  acc_t v[kChannels];

  __device__ static Values zero() {
    Values values;
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) values.v[i] = acc_t(0);
    return values;
  }
};

// A weighted sum. The first term is not added to zero, which would lose the sign of another zero:
// one term of weight 1 changes no bit.
template <typename acc_t>
struct Sum {
  Values<acc_t> values = Values<acc_t>::zero();
  bool empty = true;

  __device__ void add(acc_t weight, const Values<acc_t>& term) {
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      const acc_t product = weight * term.v[i];
      values.v[i] = empty ? product : values.v[i] + product;
    }
    empty = false;
  }
};

template <typename Source, typename acc_t>
struct Reader {
  static constexpr bool kPlain = Source::kPlain;
  const Source& source;
  const typename Source::Element* image;
  const Plan<acc_t>& plan;
  const float* table;
  int channels;
  bool contrasts;
  acc_t contrast_mean;

  __device__ acc_t load(int64_t c, int y, int x) const {
    return source.template value<acc_t>(image[source.stride.at(c, y, x)], c, table);
  }
  __device__ Values<acc_t> raw(int64_t c0, int y, int x) const {
    Values<acc_t> out = Values<acc_t>::zero();
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      if (c0 + i < channels) out.v[i] = load(c0 + i, y, x);
    }
    return out;
  }
  __device__ void sum_channels(const Values<acc_t>& values, int c0, acc_t* sum) const {
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      if (c0 + i < channels) *sum += values.v[i];
    }
  }
  __device__ acc_t channel_mean(const Values<acc_t>& all) const {
    acc_t sum = 0;
    sum_channels(all, 0, &sum);
    return sum / static_cast<acc_t>(channels);
  }
};

template <typename Source, typename acc_t>
struct Forward : Reader<Source, acc_t> {
  using Value = Values<acc_t>;

  // Brightness, saturation and contrast of a pixel of which all channels are in `out`.
  __device__ Value recolored(Value out) const {
    brighten(&out);
    return finished(out, this->plan.color.saturates() ? this->channel_mean(out) : acc_t(0));
  }
  __device__ Value colored(int64_t c0, int y, int x) const {
    Value out = this->raw(c0, y, x);
    if (this->channels <= kChannels) return recolored(out);
    acc_t mean = 0;
    if (this->plan.color.saturates()) {
      DMFAST_ROLLED
      for (int c = 0; c < this->channels; c += kChannels) {
        Value part = this->raw(c, y, x);
        brighten(&part);
        this->sum_channels(part, c, &mean);
      }
      mean /= static_cast<acc_t>(this->channels);
    }
    brighten(&out);
    return finished(out, mean);
  }

  // Calls visit(c0, values) for all channels of pixel (y, x): of the result, or, when `summing`, of
  // what the contrast's mean is taken of, which has not moved yet.
  template <typename Visit>
  __device__ void pixel(int y, int x, bool summing, const Visit& visit) const {
    DMFAST_ROLLED
    for (int c0 = 0; c0 < this->channels; c0 += kChannels) visit(c0, moved(c0, y, x, !summing));
  }

 private:
  __device__ Value moved(int c0, int y, int x, bool moves) const {
    const Plan<acc_t>& plan = this->plan;
    const bool shifts = plan.shifts && moves;
    Sum<acc_t> out;
    plan.rotate.sources(
        y, x,
        [&](int ry, int rx, acc_t weight) {
          Sum<acc_t> inner;
          plan.scale.sources(
              ry, rx,
              [&](int sy, int sx, acc_t inner_weight) {
                const bool inside = !shifts || plan.shift.source(&sy, &sx);
                inner.add(inner_weight, inside ? colored(c0, sy, sx) : Value::zero());
              },
              plan.scales && moves);
          out.add(weight, inner.values);
        },
        plan.rotates && moves);
    return out.values;
  }
  __device__ void brighten(Value* out) const {
    if (!this->plan.color.brightens()) return;
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) out->v[i] += this->plan.color.brightness;
  }
  __device__ Value finished(Value out, acc_t mean) const {
    const Color<acc_t>& color = this->plan.color;
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      if (color.saturates()) out.v[i] = about(out.v[i], mean, color.saturation);
      if (this->contrasts) out.v[i] = about(out.v[i], this->contrast_mean, color.contrast);
    }
    return out;
  }
};

template <typename Source, typename acc_t>
struct Adjoint : Reader<Source, acc_t> {
  using Value = Values<acc_t>;

  __device__ Value recolored(Value out) const {
    contrast(&out);
    return finished(out, this->plan.color.saturates() ? this->channel_mean(out) : acc_t(0));
  }

  // As the forward's: `summing` gives what has moved back and not been colored.
  template <typename Visit>
  __device__ void pixel(int y, int x, bool summing, const Visit& visit) const {
    const bool saturates = this->plan.color.saturates() && !summing;
    const bool apart = saturates && this->channels > kChannels;  // then the mean takes a round
    acc_t mean = 0;
    DMFAST_ROLLED
    for (int round = apart ? 0 : 1; round < 2; ++round) {
      DMFAST_ROLLED
      for (int c0 = 0; c0 < this->channels; c0 += kChannels) {
        Value out = moved(c0, y, x);
        if (!summing) contrast(&out);
        if (round == 0) {
          this->sum_channels(out, c0, &mean);
          continue;
        }
        if (saturates) {
          out = finished(
              out, apart ? mean / static_cast<acc_t>(this->channels) : this->channel_mean(out));
        }
        visit(c0, out);
      }
    }
  }

 private:
  __device__ Value moved(int c0, int y, int x) const {
    const Plan<acc_t>& plan = this->plan;
    Sum<acc_t> out;
    if (plan.shifts && !plan.shift.target(&y, &x)) return out.values;
    plan.scale.targets(
        y, x,
        [&](int sy, int sx, acc_t weight) {
          Sum<acc_t> inner;
          plan.rotate.targets(
              sy, sx,
              [&](int ry, int rx, acc_t inner_weight) {
                inner.add(inner_weight, this->raw(c0, ry, rx));
              },
              plan.rotates);
          out.add(weight, inner.values);
        },
        plan.scales);
    return out.values;
  }
  __device__ void contrast(Value* out) const {
    if (!this->contrasts) return;
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      out->v[i] = about_adjoint(out->v[i], this->contrast_mean, this->plan.color.contrast);
    }
  }
  __device__ Value finished(Value out, acc_t mean) const {
    if (!this->plan.color.saturates()) return out;
    DMFAST_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      out.v[i] = about_adjoint(out.v[i], mean, this->plan.color.saturation);
    }
    return out;
  }
};

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// The steps of an augmentation on whole images; see cpu_isa.h for how this is compiled.
#pragma once

#include "augment_plan.h"
#include "loop_headers.h"

namespace dmfast {
namespace {

#ifdef DMFAST_VECTOR_BYTES
constexpr int64_t kVectorBytes = DMFAST_VECTOR_BYTES;
#else
constexpr int64_t kVectorBytes = 16;
#endif

// ---- Color -------------------------------------------------------------------------------------

// Means are moved about in place: gcc does not turn a loop from one image to another that may be
// the same into vectors.

// Moves each value about the mean of its pixel. NCHW: a run of pixels at a time.
template <typename acc_t, typename Move>
void move_about_pixels(const Layout& layout, acc_t* image, const Move& move) {
  constexpr int64_t kRun = 256;
  const int64_t channels = layout.planes, pixels = layout.pixels();
  for (int64_t first = 0; first < pixels; first += kRun) {
    const int64_t count = pixels - first < kRun ? pixels - first : kRun;
    acc_t mean[kRun] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const acc_t* values = image + c * pixels + first;
      for (int64_t i = 0; i < count; ++i) mean[i] += values[i];
    }
    for (int64_t i = 0; i < count; ++i) mean[i] /= static_cast<acc_t>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      acc_t* values = image + c * pixels + first;
      for (int64_t i = 0; i < count; ++i) values[i] = move(values[i], mean[i]);
    }
  }
}

// NHWC: kChannels adjacent channels, or as many as the layout says where that is 0.
template <int64_t kChannels, typename acc_t, typename Move>
void move_about_adjacent(const Layout& layout, acc_t* image, const Move& move) {
  const int64_t channels = kChannels ? kChannels : layout.adjacent;
  for (int64_t p = 0; p < layout.pixels(); ++p) {
    acc_t sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += image[p * channels + c];
    const acc_t mean = sum / static_cast<acc_t>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      image[p * channels + c] = move(image[p * channels + c], mean);
    }
  }
}

template <typename acc_t, typename Move>
void saturate(const Layout& layout, acc_t* image, const Move& move) {
  if (!layout.channels_last()) {
    move_about_pixels(layout, image, move);
  } else if (layout.adjacent == 3) {
    move_about_adjacent<3>(layout, image, move);
  } else {
    move_about_adjacent<0>(layout, image, move);
  }
}

// In an order that depends on the size alone, whatever the width of a vector.
template <typename acc_t>
double image_mean(const acc_t* image, int64_t count) {
  constexpr int64_t kSums = 16, kLanes = kVectorBytes / sizeof(double);
  typedef acc_t values_t __attribute__((vector_size(kLanes * sizeof(acc_t))));
  typedef double sums_t __attribute__((vector_size(kVectorBytes)));
  sums_t sums[kSums / kLanes] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t s = 0; s < kSums / kLanes; ++s) {
      values_t values;
      std::memcpy(&values, image + i + s * kLanes, sizeof values);
      sums[s] += __builtin_convertvector(values, sums_t);
    }
  }
  double total = 0;
  for (; i < count; ++i) total += image[i];
  for (int64_t s = 0; s < kSums; ++s) total += sums[s / kLanes][s % kLanes];
  return total / static_cast<double>(count);
}

// Moves each value about the mean of the image.
template <typename acc_t, typename Move>
void contrast(const Layout& layout, acc_t* image, const Move& move) {
  const acc_t mean = static_cast<acc_t>(image_mean(image, layout.numel()));
  for (int64_t i = 0; i < layout.numel(); ++i) image[i] = move(image[i], mean);
}

// from one image to another
template <typename acc_t>
void color(const Plan<acc_t>& plan, const acc_t* from, acc_t* image) {
  const acc_t brightness = plan.brightness, factor = plan.saturation, factor_of_all = plan.contrast;
  const int64_t count = plan.layout.numel();
  if (brightness != acc_t(0)) {
    for (int64_t i = 0; i < count; ++i) image[i] = from[i] + brightness;
  } else {
    std::memcpy(image, from, count * sizeof(acc_t));
  }
  if (factor != acc_t(1)) {
    saturate(plan.layout, image, [=](acc_t x, acc_t mean) { return about(x, mean, factor); });
  }
  if (factor_of_all != acc_t(1)) {
    contrast(plan.layout, image,
             [=](acc_t x, acc_t mean) { return about(x, mean, factor_of_all); });
  }
}

template <typename acc_t>
void color_adjoint(const Plan<acc_t>& plan, const acc_t* from, acc_t* gradient) {
  const acc_t factor = plan.saturation, factor_of_all = plan.contrast;
  std::memcpy(gradient, from, plan.layout.numel() * sizeof(acc_t));
  if (factor_of_all != acc_t(1)) {
    contrast(plan.layout, gradient,
             [=](acc_t g, acc_t mean) { return about_adjoint(g, mean, factor_of_all); });
  }
  if (factor != acc_t(1)) {
    saturate(plan.layout, gradient,
             [=](acc_t g, acc_t mean) { return about_adjoint(g, mean, factor); });
  }
}

// ---- Crop, cutout, flip ------------------------------------------------------------------------

// Values where they lie, whatever they mean: word_t is an unsigned integer of their size.
template <typename word_t>
void mask(const std::vector<int8_t>& keep, word_t* row) {
  const int8_t* marks = keep.data();
  const int64_t count = static_cast<int64_t>(keep.size());
  for (int64_t i = 0; i < count; ++i) row[i] &= static_cast<word_t>(static_cast<int64_t>(marks[i]));
}

// Pixels first - left, first - left - 1, ... of a row to left <= x < right of another.
template <typename word_t>
void mirror_row(const word_t* from, int64_t first, int64_t left, int64_t right, int64_t adjacent,
                word_t* to) {
  if (adjacent == 1) {
    for (int64_t x = left; x < right; ++x) to[x] = from[first - x];
    return;
  }
  const auto copy = [&](int64_t x, int64_t count) {
    std::memcpy(to + x * adjacent, from + (first - x) * adjacent, count * sizeof(word_t));
  };
  if (adjacent == 3 && right - left > 1) {
    // Four values are one move: the next pixel overwrites the fourth. It is not read beyond the
    // first pixel, nor written beyond the last.
    copy(left, 3);
    for (int64_t x = left + 1; x < right - 1; ++x) copy(x, 4);
    copy(right - 1, 3);
  } else {
    for (int64_t x = left; x < right; ++x) copy(x, adjacent);
  }
}

template <typename word_t>
void copy_rows(const RowCopies& copies, const Layout& layout, const word_t* from, word_t* to) {
  const int64_t row = layout.width * layout.adjacent, plane = layout.height * row;
  const int64_t left = copies.left, right = copies.right;
  for (int64_t k = 0; k < layout.planes; ++k, from += plane, to += plane) {
    if (copies.top >= copies.bottom || left >= right) {
      std::memset(to, 0, plane * sizeof(word_t));
      continue;
    }
    std::memset(to, 0, copies.top * row * sizeof(word_t));
    std::memset(to + copies.bottom * row, 0,
                (layout.height - copies.bottom) * row * sizeof(word_t));
    if (copies.mirrored) {
      for (int64_t y = copies.top; y < copies.bottom; ++y) {
        const word_t* source = from + (y + copies.down) * row;
        mirror_row(source, copies.first, left, right, layout.adjacent, to + y * row);
      }
    } else {
      // In one run: what it puts beside the columns that have a source is masked below.
      const int64_t begin = copies.top * row + left * layout.adjacent;
      const int64_t end = (copies.bottom - 1) * row + right * layout.adjacent;
      const int64_t shift = copies.down * row + copies.first * layout.adjacent;
      std::memcpy(to + begin, from + begin + shift, (end - begin) * sizeof(word_t));
    }
    for (int64_t y = copies.top; y < copies.bottom; ++y) {
      const bool hole = y >= copies.hole_top && y < copies.hole_bottom;
      mask(hole ? copies.keep_beside_hole : copies.keep, to + y * row);
    }
  }
}

// ---- Scale and rotate --------------------------------------------------------------------------

// Many images under the same map: a vector holds a pixel of several planes of several images, so
// that every term is one weight for all of its lanes. Channels of NHWC images are planes here too.
template <typename acc_t>
struct Lanes {
  static constexpr int64_t kCount = 64 / sizeof(acc_t);
};

// How many images fill the lanes; one where it has more channels than there are lanes.
template <typename acc_t>
int64_t images_at_once(const Layout& layout) {
  const int64_t images = Lanes<acc_t>::kCount / layout.channels();
  return images > 0 ? images : 1;
}

// What each lane holds: pixel p of lane i is at[i][p * step]. Lanes that are left over hold what
// the last of the `used` ones does.
template <typename acc_t, typename value_t>
struct Planes {
  static constexpr int64_t kCount = Lanes<acc_t>::kCount;
  value_t* at[kCount];
  int64_t used, step;

  // The planes of these images from number `first` on.
  Planes(const Layout& layout, value_t* const* images, int64_t count, int64_t first)
      : step(layout.adjacent) {
    const int64_t channels = layout.channels(), left = count * channels - first;
    used = left < kCount ? left : kCount;
    for (int64_t i = 0; i < kCount; ++i) {
      const int64_t plane = first + (i < used ? i : used - 1), c = plane % channels;
      at[i] = images[plane / channels] + (step == 1 ? c * layout.pixels() : c);
    }
  }
};

template <typename acc_t>
void fill_any(const Planes<acc_t, const acc_t>& planes, int64_t begin, int64_t end, acc_t* lanes) {
  constexpr int64_t kCount = Lanes<acc_t>::kCount;
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t i = 0; i < kCount; ++i) lanes[p * kCount + i] = planes.at[i][p * planes.step];
  }
}

// Pixels begin .. end - 1, which are all that `lanes` holds.
template <typename acc_t>
void empty_any(const acc_t* lanes, int64_t begin, int64_t end, const Planes<acc_t, acc_t>& planes) {
  constexpr int64_t kCount = Lanes<acc_t>::kCount;
  for (int64_t p = begin; p < end; ++p, lanes += kCount) {
    for (int64_t i = 0; i < planes.used; ++i) planes.at[i][p * planes.step] = lanes[i];
  }
}

template <typename acc_t>
void fill_lanes(const Planes<acc_t, const acc_t>& planes, int64_t pixels, acc_t* lanes) {
  fill_any(planes, 0, pixels, lanes);
}

template <typename acc_t>
void empty_lanes(const acc_t* lanes, int64_t begin, int64_t end,
                 const Planes<acc_t, acc_t>& planes) {
  empty_any(lanes, begin, end, planes);
}

#if defined(__SSE2__)
// Four values each of four rows, turned.
inline void turn(const float* from, int64_t from_row, float* const* to, int64_t at) {
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_row);
  __m128 c = _mm_loadu_ps(from + 2 * from_row), d = _mm_loadu_ps(from + 3 * from_row);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to[0] + at, a);
  _mm_storeu_ps(to[1] + at, b);
  _mm_storeu_ps(to[2] + at, c);
  _mm_storeu_ps(to[3] + at, d);
}

inline void turn(const float* const* from, int64_t at, float* to, int64_t to_row) {
  __m128 a = _mm_loadu_ps(from[0] + at), b = _mm_loadu_ps(from[1] + at);
  __m128 c = _mm_loadu_ps(from[2] + at), d = _mm_loadu_ps(from[3] + at);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_row, b);
  _mm_storeu_ps(to + 2 * to_row, c);
  _mm_storeu_ps(to + 3 * to_row, d);
}

// NCHW: a cache line of every plane at a time. NHWC with three channels: four values for every
// pixel but the last, of which the next pixel, or the next image's lanes, overwrite the fourth.
inline void fill_lanes(const Planes<float, const float>& planes, int64_t pixels, float* lanes) {
  constexpr int64_t kCount = Lanes<float>::kCount;
  int64_t done = 0;
  if (planes.step == 1) {
    for (; done + 16 <= pixels; done += 16) {
      for (int64_t i = 0; i < planes.used; i += 4) {
        for (int64_t p = done; p < done + 16; p += 4) {
          turn(planes.at + i, p, lanes + p * kCount + i, kCount);
        }
      }
    }
  } else if (planes.step == 3 && planes.used % 3 == 0) {
    for (; done + 1 < pixels; ++done) {
      for (int64_t i = 0; i < planes.used; i += 3) {
        _mm_storeu_ps(lanes + done * kCount + i, _mm_loadu_ps(planes.at[i] + done * 3));
      }
    }
  }
  fill_any(planes, done, pixels, lanes);
}

inline void empty_lanes(const float* lanes, int64_t begin, int64_t end,
                        const Planes<float, float>& planes) {
  constexpr int64_t kCount = Lanes<float>::kCount;
  int64_t done = begin;
  if (planes.step == 1) {
    for (; done + 16 <= end; done += 16, lanes += 16 * kCount) {
      for (int64_t i = 0; i < planes.used; i += 4) {
        for (int64_t p = 0; p < 16; p += 4) {
          turn(lanes + p * kCount + i, kCount, planes.at + i, done + p);
        }
      }
    }
  } else if (planes.step == 3 && planes.used % 3 == 0) {
    for (; done + 1 < end; ++done, lanes += kCount) {
      for (int64_t i = 0; i < planes.used; i += 3) {
        _mm_storeu_ps(planes.at[i] + done * 3, _mm_loadu_ps(lanes + i));
      }
    }
  }
  empty_any(lanes, done, end, planes);
}
#endif

// The lanes of a pixel times a weight, and added to others: in vectors of the machine's width.
template <typename acc_t>
struct LaneSum {
  typedef acc_t vector_t __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int64_t kParts = 64 / kVectorBytes;
  vector_t part[kParts];

  void start(acc_t weight, const acc_t* lanes) {
    const vector_t* source = reinterpret_cast<const vector_t*>(lanes);
    for (int64_t i = 0; i < kParts; ++i) part[i] = weight * source[i];
  }
  void add(acc_t weight, const acc_t* lanes) {
    const vector_t* source = reinterpret_cast<const vector_t*>(lanes);
    for (int64_t i = 0; i < kParts; ++i) part[i] += weight * source[i];
  }
  void store(acc_t* lanes) const {
    vector_t* target = reinterpret_cast<vector_t*>(lanes);
    for (int64_t i = 0; i < kParts; ++i) target[i] = part[i];
  }
};

// Pixels begin .. end - 1 of the output, which are all that `to` holds.
template <typename acc_t>
void apply(const PixelMap<acc_t>& map, int64_t begin, int64_t end, const acc_t* from, acc_t* to) {
  constexpr int64_t kCount = Lanes<acc_t>::kCount;
  const typename PixelMap<acc_t>::Term* terms = map.terms.data();
  const int32_t* starts = map.starts.data();
  for (int64_t p = begin; p < end; ++p, to += kCount) {
    const int64_t count = starts[p + 1] - starts[p];
    const auto* term = terms + starts[p];
    if (count == 0) {
      std::memset(to, 0, kCount * sizeof(acc_t));
      continue;
    }
    // The first term is not added to zero, which would lose the sign of another zero.
    LaneSum<acc_t> sum;
    sum.start(term[0].weight, from + term[0].source * kCount);
    if (count == 4) {  // most of them: no loop
      sum.add(term[1].weight, from + term[1].source * kCount);
      sum.add(term[2].weight, from + term[2].source * kCount);
      sum.add(term[3].weight, from + term[3].source * kCount);
    } else {
      for (int64_t t = 1; t < count; ++t) {
        sum.add(term[t].weight, from + term[t].source * kCount);
      }
    }
    sum.store(to);
  }
}

template <typename acc_t>
void warp(Workspace<acc_t>& workspace, const acc_t* const* from, acc_t* const* to, int64_t count) {
  constexpr int64_t kCount = Lanes<acc_t>::kCount, kBlock = 64;
  const Plan<acc_t>& plan = workspace.plan;
  const int64_t pixels = plan.layout.pixels(), size = pixels * kCount;
  acc_t* lanes = workspace.lanes.at_least(2 * size + kBlock * kCount);
  acc_t* spare = lanes + size;
  acc_t* block = spare + size;
  const bool twice = plan.scales && plan.rotates;
  const PixelMap<acc_t>& first_map = plan.adjoint ? plan.rotate : plan.scale;
  const bool scale_is_last = plan.scales && (plan.adjoint || !plan.rotates);
  const PixelMap<acc_t>& last_map = scale_is_last ? plan.scale : plan.rotate;
  for (int64_t first = 0; first < count * plan.layout.channels(); first += kCount) {
    fill_lanes(Planes<acc_t, const acc_t>(plan.layout, from, count, first), pixels, lanes);
    if (twice) apply(first_map, 0, pixels, lanes, spare);
    // The last map block by block, while its lanes are in the cache.
    const Planes<acc_t, acc_t> planes(plan.layout, to, count, first);
    for (int64_t begin = 0; begin < pixels; begin += kBlock) {
      const int64_t end = begin + kBlock < pixels ? begin + kBlock : pixels;
      apply(last_map, begin, end, twice ? spare : lanes, block);
      empty_lanes(block, begin, end, planes);
    }
  }
}

}  // namespace
}  // namespace dmfast

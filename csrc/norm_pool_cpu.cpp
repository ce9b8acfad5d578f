// SPDX-License-Identifier: MIT
#include "norm_pool_cpu.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu_types.h"
#include "norm_pool.h"

// One copy of a function, with all it calls, for each kind of processor; chosen at run time. Sums
// have a fixed order and contraction is off, so that every copy gives the same bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DMFAST_CLONES \
  __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DMFAST_CLONES
#endif

namespace dmfast {
namespace {

constexpr int64_t kChannelsAtOnce = 128;  // of channels_last images: their sums stay in L1

int64_t channel_runs(int64_t channels) {
  return (channels + kChannelsAtOnce - 1) / kChannelsAtOnce;
}

// What is added to a plane's sums: short runs are summed in turn, for rounding grows with the
// length of a chain of additions.
constexpr int64_t kLanes = 16, kRun = 16 * kLanes;

// The sum of term(i) over 0 <= i < count, for a few terms at once.
template <int kTerms, typename acc_t, typename Term>
void sum_terms(int64_t count, const Term& term, acc_t* sums) {
  acc_t total[kTerms][kLanes] = {};
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t end = std::min(first + kRun, count);
    acc_t run[kTerms][kLanes] = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        acc_t values[kTerms];
        term(i + lane, values);
        for (int t = 0; t < kTerms; ++t) run[t][lane] += values[t];
      }
    }
    for (int64_t lane = 0; i < end; ++i, ++lane) {
      acc_t values[kTerms];
      term(i, values);
      for (int t = 0; t < kTerms; ++t) run[t][lane] += values[t];
    }
    for (int t = 0; t < kTerms; ++t) {
      for (int64_t lane = 0; lane < kLanes; ++lane) total[t][lane] += run[t][lane];
    }
  }
  for (int t = 0; t < kTerms; ++t) {
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t lane = 0; lane < width; ++lane) total[t][lane] += total[t][lane + width];
    }
    sums[t] = total[t][0];
  }
}

// The parameters and statistics of image n.
template <typename acc_t>
struct ImageNorm {
  const acc_t *weight, *bias;  // [channels], or null
  acc_t *mean, *rstd;          // [channels]

  ImageNorm(const NormPool& call, int64_t n) {
    const NormPoolSize& size = call.size;
    const int64_t network = n / (size.images / size.networks);
    const auto parameters = [&](const void* all) {
      return all ? static_cast<const acc_t*>(all) + network * size.channels : nullptr;
    };
    weight = parameters(call.weight);
    bias = parameters(call.bias);
    mean = static_cast<acc_t*>(call.statistics) + n * 2 * size.channels;
    rstd = mean + size.channels;
  }

  PlaneNorm<acc_t> plane(int64_t c) const {
    return {mean[c], rstd[c], weight ? weight[c] : acc_t(1), bias ? bias[c] : acc_t(0)};
  }

  void keep(int64_t c, const Moments<acc_t>& moments, acc_t eps) const {
    mean[c] = moments.mean;
    rstd[c] = acc_t(1) / std::sqrt(moments.variance + eps);
  }
};

// ---- NCHW: a task is a plane -------------------------------------------------------------------

// The plane in the accumulation type: where it lies, or in scratch.
template <typename T, typename acc_t>
const acc_t* as_accumulated(const T* from, int64_t count, std::vector<acc_t>& scratch) {
  if constexpr (std::is_same_v<T, acc_t>) {
    return from;
  } else {
    scratch.resize(count);
    for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<acc_t>(from[i]);
    return scratch.data();
  }
}

template <typename T, typename acc_t>
void forward_plane(const NormPoolSize& size, const ImageNorm<acc_t>& image, int64_t c, const T* x,
                   acc_t eps, T* out, std::vector<acc_t>& scratch, std::vector<acc_t>& row) {
  const int64_t height = size.height, width = size.width, pixels = size.pixels();
  const acc_t* z = as_accumulated(x, pixels, scratch);
  const acc_t count = static_cast<acc_t>(pixels);
  acc_t sums[2];
  sum_terms<1>(pixels, [&](int64_t i, acc_t* term) { term[0] = z[i]; }, sums);
  const acc_t estimate = sums[0] / count;
  sum_terms<2>(
      pixels,
      [&](int64_t i, acc_t* term) {
        term[0] = z[i] - estimate;
        term[1] = term[0] * term[0];
      },
      sums);
  image.keep(c, {estimate, sums[0], sums[1], count}, eps);
  const PlaneNorm<acc_t> norm = image.plane(c);
  row.resize(width);
  acc_t* pairs = row.data();
  for (int64_t y = 0; y < height / 2; ++y) {
    const acc_t *upper = z + 2 * y * width, *lower = upper + width;
    for (int64_t j = 0; j < width; ++j) pairs[j] = relu(norm(upper[j])) + relu(norm(lower[j]));
    T* to = out + y * (width / 2);
    for (int64_t j = 0; j < width / 2; ++j) {
      to[j] = static_cast<T>((pairs[2 * j] + pairs[2 * j + 1]) * acc_t(0.25));
    }
  }
}

template <typename T, typename acc_t>
void backward_plane(const NormPoolSize& size, const ImageNorm<acc_t>& image, int64_t c,
                    const T* gradient, const T* x, T* x_gradient, acc_t* sums,
                    std::vector<acc_t>& scratch, std::vector<acc_t>& of_y,
                    std::vector<acc_t>& row) {
  const int64_t height = size.height, width = size.width, pixels = size.pixels();
  const acc_t* z = as_accumulated(x, pixels, scratch);
  const PlaneNorm<acc_t> norm = image.plane(c);
  // The gradient of y; what pooling leaves out at odd sides has none.
  of_y.assign(pixels, acc_t(0));
  row.assign(width, acc_t(0));
  acc_t *to = of_y.data(), *spread = row.data();
  for (int64_t y = 0; y < height / 2 * 2; ++y) {
    const T* from = gradient + y / 2 * (width / 2);
    for (int64_t j = 0; j < width / 2; ++j) {
      spread[2 * j] = spread[2 * j + 1] = static_cast<acc_t>(from[j]) * acc_t(0.25);
    }
    const acc_t* line = z + y * width;
    for (int64_t j = 0; j < width; ++j) to[y * width + j] = relu_gradient(norm(line[j]), spread[j]);
  }
  acc_t total[2];
  sum_terms<2>(
      pixels,
      [&](int64_t i, acc_t* term) {
        term[0] = to[i] * norm.normalised(z[i]);
        term[1] = to[i];
      },
      total);
  sums[c] = total[0];
  sums[size.channels + c] = total[1];
  if (!x_gradient) return;
  const acc_t product = total[0] / static_cast<acc_t>(pixels);
  const acc_t mean = total[1] / static_cast<acc_t>(pixels);
  for (int64_t i = 0; i < pixels; ++i) {
    x_gradient[i] = static_cast<T>(norm_gradient(norm, z[i], to[i], mean, product));
  }
}

// ---- channels_last: a task is a run of channels of an image ------------------------------------

// A number for each channel of a run.
template <typename acc_t>
struct ChannelRun {
  acc_t value[kChannelsAtOnce];
  acc_t& operator[](int64_t c) { return value[c]; }
};

// The parameters of a run, one array each, so that loops over channels are loops over vectors.
template <typename acc_t>
struct RunNorm {
  ChannelRun<acc_t> mean, rstd, weight, bias;

  RunNorm(const ImageNorm<acc_t>& image, int64_t first, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const PlaneNorm<acc_t> plane = image.plane(first + c);
      mean[c] = plane.mean;
      rstd[c] = plane.rstd;
      weight[c] = plane.weight;
      bias[c] = plane.bias;
    }
  }

  PlaneNorm<acc_t> plane(int64_t c) { return {mean[c], rstd[c], weight[c], bias[c]}; }
};

template <typename T, typename acc_t>
void forward_run(const NormPoolSize& size, const ImageNorm<acc_t>& image, int64_t first,
                 int64_t channels, const T* x, acc_t eps, T* out) {
  const int64_t height = size.height, width = size.width, stride = size.channels;
  const acc_t count = static_cast<acc_t>(size.pixels());
  ChannelRun<acc_t> estimate = {}, deviations = {}, squares = {};
  for (int64_t y = 0; y < height; ++y) {
    ChannelRun<acc_t> row = {};
    for (int64_t j = 0; j < width; ++j) {
      const T* z = x + (y * width + j) * stride + first;
      for (int64_t c = 0; c < channels; ++c) row[c] += static_cast<acc_t>(z[c]);
    }
    for (int64_t c = 0; c < channels; ++c) estimate[c] += row[c];
  }
  for (int64_t c = 0; c < channels; ++c) estimate[c] /= count;
  for (int64_t y = 0; y < height; ++y) {
    ChannelRun<acc_t> row = {}, row_squares = {};
    for (int64_t j = 0; j < width; ++j) {
      const T* z = x + (y * width + j) * stride + first;
      for (int64_t c = 0; c < channels; ++c) {
        const acc_t deviation = static_cast<acc_t>(z[c]) - estimate[c];
        row[c] += deviation;
        row_squares[c] += deviation * deviation;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      deviations[c] += row[c];
      squares[c] += row_squares[c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    image.keep(first + c, {estimate[c], deviations[c], squares[c], count}, eps);
  }
  RunNorm<acc_t> norm(image, first, channels);
  for (int64_t y = 0; y < height / 2; ++y) {
    for (int64_t j = 0; j < width / 2; ++j) {
      const T* upper = x + (2 * y * width + 2 * j) * stride + first;
      const T* lower = upper + width * stride;
      T* to = out + (y * (width / 2) + j) * stride + first;
      for (int64_t c = 0; c < channels; ++c) {
        const PlaneNorm<acc_t> plane = norm.plane(c);
        const auto value = [&](T z) { return relu(plane(static_cast<acc_t>(z))); };
        to[c] = static_cast<T>((value(upper[c]) + value(lower[c]) +
                                (value(upper[c + stride]) + value(lower[c + stride]))) *
                               acc_t(0.25));
      }
    }
  }
}

template <typename T, typename acc_t>
void backward_run(const NormPoolSize& size, const ImageNorm<acc_t>& image, int64_t first,
                  int64_t channels, const T* gradient, const T* x, T* x_gradient, acc_t* sums) {
  const int64_t height = size.height, width = size.width, stride = size.channels;
  const int64_t even_height = height / 2 * 2, even_width = width / 2 * 2;
  RunNorm<acc_t> norm(image, first, channels);
  const auto at = [&](int64_t y, int64_t j) { return (y * width + j) * stride + first; };
  const auto pooled = [&](int64_t y, int64_t j) {
    return gradient + (y / 2 * (width / 2) + j / 2) * stride + first;
  };
  ChannelRun<acc_t> product = {}, mean = {};
  for (int64_t y = 0; y < even_height; ++y) {
    ChannelRun<acc_t> row_product = {}, row = {};
    for (int64_t j = 0; j < even_width; ++j) {
      const T *z = x + at(y, j), *from = pooled(y, j);
      for (int64_t c = 0; c < channels; ++c) {
        const PlaneNorm<acc_t> plane = norm.plane(c);
        const acc_t value = static_cast<acc_t>(z[c]);
        const acc_t of_y = relu_gradient(plane(value), static_cast<acc_t>(from[c]) * acc_t(0.25));
        row_product[c] += of_y * plane.normalised(value);
        row[c] += of_y;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      product[c] += row_product[c];
      mean[c] += row[c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    sums[first + c] = product[c];
    sums[size.channels + first + c] = mean[c];
    product[c] /= static_cast<acc_t>(size.pixels());
    mean[c] /= static_cast<acc_t>(size.pixels());
  }
  if (!x_gradient) return;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t j = 0; j < width; ++j) {
      const T* z = x + at(y, j);
      T* to = x_gradient + at(y, j);
      if (y < even_height && j < even_width) {
        const T* from = pooled(y, j);
        for (int64_t c = 0; c < channels; ++c) {
          const PlaneNorm<acc_t> plane = norm.plane(c);
          const acc_t value = static_cast<acc_t>(z[c]);
          const acc_t of_y = relu_gradient(plane(value), static_cast<acc_t>(from[c]) * acc_t(0.25));
          to[c] = static_cast<T>(norm_gradient(plane, value, of_y, mean[c], product[c]));
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const acc_t value = static_cast<acc_t>(z[c]);
          to[c] =
              static_cast<T>(norm_gradient(norm.plane(c), value, acc_t(0), mean[c], product[c]));
        }
      }
    }
  }
}

// ---- Both ---------------------------------------------------------------------------------------

template <typename T>
void forward(const NormPool& call, const T* x, double eps, T* out, int64_t begin, int64_t end) {
  using acc_t = typename Accumulator<T>::type;
  const NormPoolSize& size = call.size;
  std::vector<acc_t> scratch, row;
  for (int64_t task = begin; task < end; ++task) {
    if (size.channels_last) {
      const int64_t runs = channel_runs(size.channels), n = task / runs;
      const int64_t first = task % runs * kChannelsAtOnce;
      forward_run(size, ImageNorm<acc_t>(call, n), first,
                  std::min(kChannelsAtOnce, size.channels - first),
                  x + n * size.channels * size.pixels(), static_cast<acc_t>(eps),
                  out + n * size.channels * size.pooled());
    } else {
      const int64_t n = task / size.channels, c = task % size.channels;
      forward_plane(size, ImageNorm<acc_t>(call, n), c, x + task * size.pixels(),
                    static_cast<acc_t>(eps), out + task * size.pooled(), scratch, row);
    }
  }
}

template <typename T>
void backward(const NormPool& call, const T* gradient, const T* x, T* x_gradient, void* all_sums,
              int64_t begin, int64_t end) {
  using acc_t = typename Accumulator<T>::type;
  const NormPoolSize& size = call.size;
  std::vector<acc_t> scratch, of_y, row;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tasks_of_image = size.channels_last ? channel_runs(size.channels) : size.channels;
    const int64_t n = task / tasks_of_image;
    const ImageNorm<acc_t> image(call, n);
    acc_t* sums = static_cast<acc_t*>(all_sums) + n * 2 * size.channels;
    if (size.channels_last) {
      const int64_t first = task % tasks_of_image * kChannelsAtOnce;
      const int64_t start = n * size.channels * size.pixels();
      backward_run(size, image, first, std::min(kChannelsAtOnce, size.channels - first),
                   gradient + n * size.channels * size.pooled(), x + start,
                   x_gradient ? x_gradient + start : nullptr, sums);
    } else {
      const int64_t start = task * size.pixels();
      backward_plane(size, image, task % size.channels, gradient + task * size.pooled(), x + start,
                     x_gradient ? x_gradient + start : nullptr, sums, scratch, of_y, row);
    }
  }
}

template <typename acc_t>
void parameter_gradient(const NormPoolSize& size, const acc_t* sums, acc_t* to) {
  constexpr int64_t kImagesOfRun = 16;
  const int64_t images = size.images / size.networks;
  std::vector<acc_t> run(size.channels);
  for (int64_t r = 0; r < size.networks; ++r) {
    acc_t* total = to + r * size.channels;
    std::fill_n(total, size.channels, acc_t(0));
    for (int64_t first = 0; first < images; first += kImagesOfRun) {
      std::fill(run.begin(), run.end(), acc_t(0));
      for (int64_t n = first; n < std::min(first + kImagesOfRun, images); ++n) {
        const acc_t* from = sums + (r * images + n) * 2 * size.channels;
        for (int64_t c = 0; c < size.channels; ++c) run[c] += from[c];
      }
      for (int64_t c = 0; c < size.channels; ++c) total[c] += run[c];
    }
  }
}

}  // namespace

int64_t norm_pool_tasks(const NormPoolSize& size) {
  return size.images * (size.channels_last ? channel_runs(size.channels) : size.channels);
}

int64_t norm_pool_elements_of_a_task(const NormPoolSize& size) {
  return size.pixels() * (size.channels_last ? std::min(size.channels, kChannelsAtOnce) : 1);
}

#define DMFAST_NORM_POOL_OF(T)                                                                  \
  DMFAST_CLONES void norm_pool_of(const NormPool& call, const T* x, double eps, T* out,         \
                                  int64_t begin, int64_t end) {                                 \
    forward(call, x, eps, out, begin, end);                                                     \
  }                                                                                             \
  DMFAST_CLONES void norm_pool_backward_of(const NormPool& call, const T* gradient, const T* x, \
                                           T* x_gradient, void* sums, int64_t begin,            \
                                           int64_t end) {                                       \
    backward(call, gradient, x, x_gradient, sums, begin, end);                                  \
  }
DMFAST_NORM_POOL_OF(double)
DMFAST_NORM_POOL_OF(float)
DMFAST_NORM_POOL_OF(c10::Half)
DMFAST_NORM_POOL_OF(c10::BFloat16)
#undef DMFAST_NORM_POOL_OF

void norm_pool_range(const NormPool& call, const void* x, double eps, void* out, int64_t begin,
                     int64_t end) {
  with_dtype(call.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_integral_v<T>) {
      norm_pool_of(call, static_cast<const T*>(x), eps, static_cast<T*>(out), begin, end);
    }
  });
}

void norm_pool_backward_range(const NormPool& call, const void* gradient, const void* x,
                              void* x_gradient, void* sums, int64_t begin, int64_t end) {
  with_dtype(call.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_integral_v<T>) {
      norm_pool_backward_of(call, static_cast<const T*>(gradient), static_cast<const T*>(x),
                            static_cast<T*>(x_gradient), sums, begin, end);
    }
  });
}

void norm_pool_parameter_gradient(const NormPool& call, const void* sums, int which, void* to) {
  with_dtype(call.dtype, [&](auto element) {
    using acc_t = typename Accumulator<decltype(element)>::type;
    const acc_t* from = static_cast<const acc_t*>(sums) + which * call.size.channels;
    parameter_gradient(call.size, from, static_cast<acc_t*>(to));
  });
}

}  // namespace dmfast

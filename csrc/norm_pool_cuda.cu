// SPDX-License-Identifier: MIT
// Instance norm, ReLU and 2x2 mean pooling on a GPU. A block takes a plane, or in channels_last 32
// adjacent channels of an image; a thread of it every so many windows of 2x2 pixels, of channels
// that one load brings. In channels_last of up to 32x32 pixels the windows stay in registers, so
// that an image is read once; else each pass over them reads them again.
#include <cmath>
#include <type_traits>

#include "cuda_host.h"
#include "cuda_types.h"
#include "norm_pool.h"
#include "norm_pool_cuda.h"

namespace dmfast {
namespace {

constexpr int kWarp = 32;
constexpr int kMostWarps = 8;  // of a block
// The first estimate of a mean is from at least 1 / kEstimated of the windows: so many variances
// may then be the square of its distance from the mean at most, which float32 has bits for.
constexpr int kEstimated = 8;
constexpr int kSumLanes = 16;  // images that a block adds at a time
constexpr int kSumRun = 4;     // images that a thread of it has in flight

// How the threads of a warp are spread: kColumns over the channels, kWide of them each, and the
// others over windows.
template <typename Element, int kAdjacent, int kAcross>
struct Spread {
  using T = Element;
  using acc_t = typename Accumulator<T>::type;
  static constexpr int kWide = kAdjacent, kColumns = kAcross;
  static constexpr int kChannels = kWide * kColumns;  // of a block: 1 or 32
  static constexpr int kLanes = kWarp / kColumns;     // windows that a warp takes at a time
  // Windows that a thread takes before there are more threads; packs of channels it then holds, in
  // 64 registers.
  static constexpr int kWindows = kWide > 1 ? 64 / static_cast<int>(sizeof(T) * kWide) : 4;
};

// Images as the kernels see them; strides are in elements.
struct Planes {
  int64_t images, images_of_network;
  int64_t channel, pooled_channel;  // from a channel to the next, of x and out
  int64_t pixel;                    // from a pixel to the next, of both
  int channels, height, width;
  int rows, columns;          // of windows
  int row_step, column_step;  // from a window of a thread to its next
  int estimated_windows;      // that a thread adds to the estimate of the mean
  int64_t estimated;          // pixels of a plane that the estimate is from

  DMFAST_HD int64_t pixels() const { return int64_t{height} * width; }
  DMFAST_HD int64_t pooled() const { return int64_t{height / 2} * (width / 2); }
};

// The windows of a thread, in turn. At odd sides the last row or column has windows of which parts
// are missing; these are not pooled.
template <typename Offset>
struct Walk {
  const Planes& planes;
  int row, column;

  __device__ Walk(const Planes& all, int first, bool any) : planes(all) {
    row = any ? first / planes.columns : planes.rows;
    column = first % planes.columns;
  }
  // Keeps the compiler from holding the offsets of all windows from one pass to the next.
  __device__ void forget() {
#if defined(__CUDACC__)
    asm volatile("" : "+r"(row), "+r"(column));
#endif
  }
  __device__ bool inside() const { return row < planes.rows; }
  __device__ void next() {
    row += planes.row_step;
    column += planes.column_step;
    if (column >= planes.columns) {
      column -= planes.columns;
      ++row;
    }
  }
  __device__ bool has_right() const { return column < planes.width / 2; }
  __device__ bool has_lower() const { return row < planes.height / 2; }
  __device__ bool is_pooled() const { return has_right() && has_lower(); }
  __device__ Offset pooled_offset() const {
    return (Offset(row) * (planes.width / 2) + column) * static_cast<Offset>(planes.pixel);
  }

  // Calls body(i, offset) for each pixel i that the window has, row by row.
  template <typename Body>
  __device__ void each_pixel(const Body& body) const {
    const Offset pixel = static_cast<Offset>(planes.pixel);
    const Offset offset = (Offset(2 * row) * planes.width + 2 * column) * pixel;
    const Offset below = planes.width * pixel;
    const bool right = has_right();
    body(0, offset);
    if (right) body(1, offset + pixel);
    if (has_lower()) {
      body(2, offset + below);
      if (right) body(3, offset + below + pixel);
    }
  }
};

// What a thread holds is of a small image: its offsets have 32 bits.
template <bool kHeld>
using WalkOf = Walk<std::conditional_t<kHeld, uint32_t, int64_t>>;

// Adjacent channels of a pixel as one load brings them. Words that hold several elements stay words
// until one of these is asked for: converted they would take twice the registers.
template <typename T, int kWide>
struct Loaded {
  using Word = std::conditional_t<sizeof(T) == 2 && kWide == 1, uint16_t, uint32_t>;
  static constexpr int kWords =
      kWide * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(Word));
  using Words = Pack<Word, kWords>;
  Words words;

  __device__ void load(const T* from) { words = *reinterpret_cast<const Words*>(from); }

  __device__ T operator[](int i) const {
    T element;
    if constexpr (sizeof(T) == 2 && kWide > 1) {
      element.bits = static_cast<uint16_t>(words.element[i / 2] >> 16 * (i % 2));
    } else {
      memcpy(&element, &words.element[i * static_cast<int>(sizeof(T) / sizeof(Word))], sizeof(T));
    }
    return element;
  }

  // Keeps the compiler from holding what it made of the words from one pass over them to the next.
  __device__ void forget() {
#if defined(__CUDACC__)
    if constexpr (sizeof(Word) == 4) {
      DMFAST_UNROLL
      for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words.element[i]));
    }
#endif
  }
};

template <typename S>
using PackOf = Pack<typename S::T, S::kWide>;

template <typename S>
__device__ void store(const PackOf<S>& pack, typename S::T* to) {
  *reinterpret_cast<PackOf<S>*>(to) = pack;
}

// A window of x.
template <typename S>
struct Window {
  Loaded<typename S::T, S::kWide> pixel[4];

  template <typename Offset>
  __device__ void load(const Walk<Offset>& walk, const typename S::T* x) {
    walk.each_pixel([&](int i, Offset offset) { pixel[i].load(x + offset); });
  }
  __device__ void forget() {
    DMFAST_UNROLL
    for (int i = 0; i < 4; ++i) pixel[i].forget();
  }
  // Of pixel p and the thread's channel i.
  __device__ typename S::acc_t value(int p, int i) const {
    return static_cast<typename S::acc_t>(pixel[p][i]);
  }
};

// The windows of a thread, which are kept where it holds so many, and else read each time.
template <typename S, bool kHeld>
struct Windows {
  static constexpr int kCount = kHeld ? S::kWindows : 1;
  using At = WalkOf<kHeld>;
  const At start;
  const typename S::T* const x;
  Window<S> held[kCount] = {};

  __device__ Windows(const At& walk, const typename S::T* plane) : start(walk), x(plane) {
    if constexpr (kHeld) {
      At at = start;
      DMFAST_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (at.inside()) held[i].load(at, x);
        at.next();
      }
    }
  }

  // Calls body(window, walk) for the first `count` windows; where they are held, for all.
  template <typename Body>
  __device__ void each(int64_t count, const Body& body) {
    At at = start;
    if constexpr (kHeld) {
      at.forget();
      DMFAST_UNROLL
      for (int i = 0; i < kCount; ++i) {
        held[i].forget();
        if (at.inside()) body(held[i], at);
        at.next();
      }
    } else {
      DMFAST_ROLLED
      for (int64_t i = 0; i < count && at.inside(); ++i) {
        Window<S> window = {};
        window.load(at, x);
        body(window, at);
        at.next();
      }
    }
  }
  template <typename Body>
  __device__ void each(const Body& body) {
    each(INT64_MAX, body);
  }
};

// Of the channels of a block the one whose sum a lane is left with.
template <typename S>
__device__ int channel_of_lane(int lane) {
  int channel = lane % S::kColumns * S::kWide;
  DMFAST_UNROLL
  for (int half = S::kWide / 2, distance = S::kColumns; half > 0; half /= 2, distance *= 2) {
    if (lane & distance) channel += half;
  }
  return channel;
}

// Adds what the lanes of a warp have of the same channel. While a lane has several, it gives half
// of them away for the other half; it is left with one, in sums[0].
template <typename S, typename acc_t>
__device__ void add_in_warp(int lane, acc_t (&sums)[S::kWide]) {
  int distance = S::kColumns;
  DMFAST_UNROLL
  for (int half = S::kWide / 2; half > 0; half /= 2) {
    const bool upper = lane & distance;
    DMFAST_UNROLL
    for (int i = 0; i < half; ++i) {
      const acc_t given = upper ? sums[i] : sums[i + half];
      const acc_t kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(0xFFFFFFFF, given, distance);
    }
    distance *= 2;
  }
  DMFAST_UNROLL
  for (; distance < kWarp; distance *= 2) {
    sums[0] += __shfl_xor_sync(0xFFFFFFFF, sums[0], distance);
  }
}

// Adds the threads' sums of each channel of the block, a few terms of it at once, and leaves in
// totals [kTerms, kChannels] what finish(channel, terms) makes of the terms.
template <typename S, int kTerms, typename acc_t, typename Finish>
__device__ void add_in_block(acc_t (&sums)[kTerms][S::kWide], acc_t* partial, acc_t* totals,
                             const Finish& finish) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  DMFAST_UNROLL
  for (int t = 0; t < kTerms; ++t) {
    add_in_warp<S>(lane, sums[t]);
    if (lane < S::kChannels) {
      partial[(t * kMostWarps + warp) * S::kChannels + channel_of_lane<S>(lane)] = sums[t][0];
    }
  }
  __syncthreads();
  if (thread < S::kChannels) {
    acc_t terms[kTerms];
    DMFAST_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      terms[t] = 0;
      for (int w = 0; w < warps; ++w) {
        terms[t] += partial[(t * kMostWarps + w) * S::kChannels + thread];
      }
    }
    finish(thread, terms);
    DMFAST_UNROLL
    for (int t = 0; t < kTerms; ++t) totals[t * S::kChannels + thread] = terms[t];
  }
  __syncthreads();
}

// Blocks that an image takes.
template <typename S>
DMFAST_HD int runs_of(const Planes& planes) {
  return (planes.channels + S::kChannels - 1) / S::kChannels;
}

// What a thread of a task works on.
template <typename S>
struct Task {
  int64_t image;
  int first;   // of the block's channels
  int column;  // of the block's channels the first of the thread's

  __device__ Task(const Planes& planes, int64_t task) {
    const int runs = runs_of<S>(planes);
    image = task / runs;
    first = static_cast<int>(task % runs) * S::kChannels;
    column = static_cast<int>(threadIdx.x) % S::kColumns * S::kWide;
  }
  __device__ int channel() const { return first + column; }
  // The last block of an image may have channels too many.
  __device__ bool works(const Planes& planes) const { return channel() < planes.channels; }
  __device__ int64_t at(const Planes& planes) const {
    return image * planes.channels * planes.pixels() + channel() * planes.channel;
  }
  __device__ int64_t pooled_at(const Planes& planes) const {
    return image * planes.channels * planes.pooled() + channel() * planes.pooled_channel;
  }
  template <bool kHeld>
  __device__ WalkOf<kHeld> walk(const Planes& planes) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int window = thread / kWarp * S::kLanes + thread % kWarp / S::kColumns;
    return {planes, window, works(planes)};
  }
};

// The norms of a thread's channels.
template <typename S>
struct Norms {
  using acc_t = typename S::acc_t;
  PlaneNorm<acc_t> of[S::kWide];

  // mean and rstd: of the thread's channels.
  __device__ Norms(const Planes& planes, const Task<S>& task, const acc_t* weight,
                   const acc_t* bias, const acc_t* mean, const acc_t* rstd) {
    if (!task.works(planes)) return;
    const int64_t at = task.image / planes.images_of_network * planes.channels + task.channel();
    DMFAST_UNROLL
    for (int i = 0; i < S::kWide; ++i) {
      of[i] = {mean[i], rstd[i], weight ? weight[at + i] : acc_t(1),
               bias ? bias[at + i] : acc_t(0)};
    }
  }
};

template <typename S, bool kHeld, typename acc_t = typename S::acc_t, typename T = typename S::T>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    forward_kernel(const Planes planes, const acc_t* const weight, const acc_t* const bias,
                   const acc_t eps, acc_t* const statistics, const T* const x, T* const out) {
  DMFAST_SHARED(acc_t, partial, 2 * kMostWarps * S::kChannels);
  DMFAST_SHARED(acc_t, totals, 2 * S::kChannels);
  for (int64_t number = blockIdx.x; number < planes.images * runs_of<S>(planes);
       number += gridDim.x) {
    const Task<S> task(planes, number);
    Windows<S, kHeld> windows(task.template walk<kHeld>(planes), x + task.at(planes));

    // Each window is summed by itself: rounding grows with the length of a chain of additions.
    acc_t sum[1][S::kWide] = {};
    windows.each(planes.estimated_windows, [&](const Window<S>& window, const auto& walk) {
      acc_t part[S::kWide] = {};
      walk.each_pixel([&](int p, auto) {
        DMFAST_UNROLL
        for (int i = 0; i < S::kWide; ++i) {
          part[i] += window.value(p, i);
        }
      });
      DMFAST_UNROLL
      for (int i = 0; i < S::kWide; ++i) sum[0][i] += part[i];
    });
    add_in_block<S>(sum, partial, totals, [&](int, acc_t(&terms)[1]) {
      terms[0] /= static_cast<acc_t>(planes.estimated);
    });

    acc_t estimate[S::kWide], sums[2][S::kWide] = {};
    DMFAST_UNROLL
    for (int i = 0; i < S::kWide; ++i) estimate[i] = totals[task.column + i];
    windows.each([&](const Window<S>& window, const auto& walk) {
      acc_t part[2][S::kWide] = {};
      walk.each_pixel([&](int p, auto) {
        DMFAST_UNROLL
        for (int i = 0; i < S::kWide; ++i) {
          const acc_t deviation = window.value(p, i) - estimate[i];
          part[0][i] += deviation;
          part[1][i] += deviation * deviation;
        }
      });
      DMFAST_UNROLL
      for (int i = 0; i < S::kWide; ++i) {
        sums[0][i] += part[0][i];
        sums[1][i] += part[1][i];
      }
    });
    add_in_block<S>(sums, partial, totals, [&](int c, acc_t(&terms)[2]) {
      const acc_t count = static_cast<acc_t>(planes.pixels());
      const Moments<acc_t> moments(totals[c], terms[0], terms[1], count);
      terms[0] = moments.mean;
      terms[1] = acc_t(1) / std::sqrt(moments.variance + eps);
      if (task.first + c < planes.channels) {
        acc_t* const to = statistics + task.image * 2 * planes.channels + task.first + c;
        to[0] = terms[0];
        to[planes.channels] = terms[1];
      }
    });

    const acc_t* const mean = totals + task.column;
    const Norms<S> norms(planes, task, weight, bias, mean, mean + S::kChannels);
    T* const to = out + task.pooled_at(planes);
    windows.each([&](const Window<S>& window, const auto& walk) {
      if (!walk.is_pooled()) return;
      PackOf<S> pooled;
      DMFAST_UNROLL
      for (int i = 0; i < S::kWide; ++i) {
        const auto value = [&](int p) { return relu(norms.of[i](window.value(p, i))); };
        pooled.element[i] =
            static_cast<T>((value(0) + value(2) + (value(1) + value(3))) * acc_t(0.25));
      }
      store<S>(pooled, to + walk.pooled_offset());
    });
  }
}

template <typename S, bool kHeld, typename acc_t = typename S::acc_t, typename T = typename S::T>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    backward_kernel(const Planes planes, const acc_t* const weight, const acc_t* const bias,
                    const acc_t* const statistics, const T* const gradient, const T* const x,
                    T* const x_gradient, acc_t* const image_sums) {
  DMFAST_SHARED(acc_t, partial, 2 * kMostWarps * S::kChannels);
  DMFAST_SHARED(acc_t, totals, 2 * S::kChannels);
  for (int64_t number = blockIdx.x; number < planes.images * runs_of<S>(planes);
       number += gridDim.x) {
    const Task<S> task(planes, number);
    const int64_t of_image = task.image * 2 * planes.channels;
    const acc_t* const mean = statistics + of_image + task.channel();
    const Norms<S> norms(planes, task, weight, bias, mean, mean + planes.channels);
    Windows<S, kHeld> windows(task.template walk<kHeld>(planes), x + task.at(planes));
    const T* const of_out = gradient + task.pooled_at(planes);
    // Of a window that is pooled: what each of its pixels is given.
    const auto load_gradient = [&](const auto& walk, acc_t(&given)[S::kWide]) {
      Loaded<T, S::kWide> pooled;
      pooled.load(of_out + walk.pooled_offset());
      DMFAST_UNROLL
      for (int i = 0; i < S::kWide; ++i) given[i] = static_cast<acc_t>(pooled[i]) * acc_t(0.25);
    };

    acc_t sums[2][S::kWide] = {};
    windows.each([&](const Window<S>& window, const auto& walk) {
      if (!walk.is_pooled()) return;
      acc_t given[S::kWide];
      load_gradient(walk, given);
      DMFAST_UNROLL
      for (int i = 0; i < S::kWide; ++i) {
        acc_t product = 0, sum = 0;
        DMFAST_UNROLL
        for (int p = 0; p < 4; ++p) {
          const acc_t z = window.value(p, i);
          const acc_t term = relu_gradient(norms.of[i](z), given[i]);
          product += term * norms.of[i].normalised(z);
          sum += term;
        }
        sums[0][i] += product;
        sums[1][i] += sum;
      }
    });
    add_in_block<S>(sums, partial, totals, [&](int c, acc_t(&terms)[2]) {
      const bool there = task.first + c < planes.channels;
      DMFAST_UNROLL
      for (int t = 0; t < 2; ++t) {
        if (there) image_sums[of_image + t * planes.channels + task.first + c] = terms[t];
        terms[t] /= static_cast<acc_t>(planes.pixels());
      }
    });
    if (!x_gradient) continue;

    acc_t product[S::kWide], sum[S::kWide];
    DMFAST_UNROLL
    for (int i = 0; i < S::kWide; ++i) {
      product[i] = totals[task.column + i];
      sum[i] = totals[S::kChannels + task.column + i];
    }
    T* const to = x_gradient + task.at(planes);
    windows.each([&](const Window<S>& window, const auto& walk) {
      acc_t given[S::kWide] = {};
      if (walk.is_pooled()) load_gradient(walk, given);
      walk.each_pixel([&](int p, auto offset) {
        PackOf<S> of_pixel;
        DMFAST_UNROLL
        for (int i = 0; i < S::kWide; ++i) {
          const acc_t z = window.value(p, i);
          const acc_t term = relu_gradient(norms.of[i](z), given[i]);
          of_pixel.element[i] =
              static_cast<T>(norm_gradient(norms.of[i], z, term, sum[i], product[i]));
        }
        store<S>(of_pixel, to + offset);
      });
    });
  }
}

// Blocks take 32 channels of a network for one of the two gradients; a lane every kSumLanes-th
// image. The lanes are then added in order.
template <typename acc_t>
__global__ void __launch_bounds__(kWarp* kSumLanes, 1)
    parameter_gradient_kernel(const acc_t* const sums, const int64_t networks,
                              const int64_t images_of_network, const int64_t channels,
                              acc_t* const of_weight, acc_t* const of_bias) {
  DMFAST_SHARED(acc_t, partial, kSumLanes * kWarp);
  const int column = static_cast<int>(threadIdx.x), lane = static_cast<int>(threadIdx.y);
  const int64_t runs = (channels + kWarp - 1) / kWarp;
  for (int64_t task = blockIdx.x; task < networks * runs * 2; task += gridDim.x) {
    const int64_t which = task % 2, network = task / 2 / runs;
    acc_t* const gradient = which == 0 ? of_weight : of_bias;
    if (!gradient) continue;
    const int64_t channel = task / 2 % runs * kWarp + column;
    acc_t total = 0;
    if (channel < channels) {
      const int64_t stride = 2 * channels;
      const acc_t* const from =
          sums + network * images_of_network * stride + which * channels + channel;
      int64_t n = lane;
      for (; n + (kSumRun - 1) * kSumLanes < images_of_network; n += kSumRun * kSumLanes) {
        acc_t run = 0;
        DMFAST_UNROLL
        for (int i = 0; i < kSumRun; ++i) run += from[(n + i * kSumLanes) * stride];
        total += run;
      }
      DMFAST_ROLLED
      for (; n < images_of_network; n += kSumLanes) total += from[n * stride];
    }
    __syncthreads();  // partial has been read
    partial[lane * kWarp + column] = total;
    __syncthreads();
    if (lane == 0 && channel < channels) {
      acc_t sum = 0;
      for (int l = 0; l < kSumLanes; ++l) sum += partial[l * kWarp + column];
      gradient[network * channels + channel] = sum;
    }
  }
}

// ---- Launches ----------------------------------------------------------------------------------

unsigned grid(int64_t tasks) {
  return static_cast<unsigned>(tasks < INT32_MAX ? tasks : INT32_MAX);
}

// The images, spread over blocks of so many threads.
template <typename S>
struct Shape {
  Planes planes;
  unsigned blocks, threads;
  bool held;  // the threads can hold all windows

  explicit Shape(const NormPoolSize& size) {
    const int64_t rows = (size.height + 1) / 2, columns = (size.width + 1) / 2;
    const int64_t windows = rows * columns, of_warp = S::kLanes * S::kWindows;
    const int64_t needed = (windows + of_warp - 1) / of_warp;
    const int64_t warps = needed < kMostWarps ? needed : kMostWarps, at_once = warps * S::kLanes;
    const int64_t of_thread = (windows + at_once - 1) / at_once;
    const int64_t estimated = (of_thread + kEstimated - 1) / kEstimated;
    planes.images = size.images;
    planes.channels = static_cast<int>(size.channels);
    planes.images_of_network = size.images / size.networks;
    planes.channel = size.channels_last ? 1 : size.pixels();
    planes.pooled_channel = size.channels_last ? 1 : size.pooled();
    planes.pixel = size.channels_last ? size.channels : 1;
    planes.height = static_cast<int>(size.height);
    planes.width = static_cast<int>(size.width);
    planes.rows = static_cast<int>(rows);
    planes.columns = static_cast<int>(columns);
    planes.row_step = static_cast<int>(at_once / columns);
    planes.column_step = static_cast<int>(at_once % columns);
    planes.estimated_windows = static_cast<int>(estimated > S::kWindows ? estimated : S::kWindows);
    // Whole rows of windows, and the first windows of the next.
    const int64_t first = planes.estimated_windows * at_once;
    const int64_t whole = first < windows ? first / columns : rows;
    const int64_t above = 2 * whole < size.height ? 2 * whole : size.height;
    const int64_t below = size.height - above < 2 ? size.height - above : 2;
    const int64_t left = first % columns * 2;
    planes.estimated = above * size.width + below * (left < size.width ? left : size.width);
    blocks = grid(size.images * runs_of<S>(planes));
    threads = static_cast<unsigned>(warps) * kWarp;
    held = S::kWide > 1 && of_thread <= S::kWindows && size.channels * size.pixels() <= INT32_MAX;
  }
};

// Calls body with the spread that suits the layout; in channels_last packs of channels where their
// number and the alignment of all tensors allow it.
template <typename Body>
int with_spread(const NormPool& call, std::initializer_list<const void*> tensors,
                const Body& body) {
  return with_cuda_type(call.dtype, [&](auto element) {
    using T = decltype(element);
    if (!call.size.channels_last) return body(Spread<T, 1, 1>{});
    constexpr int kWide = sizeof(T) == 2 ? 4 : kPack<T>;
    bool wide = call.size.channels % kWide == 0;
    for (const void* data : tensors) wide = wide && is_aligned(data, 16);
    if (wide) return body(Spread<T, kWide, kWarp / kWide>{});
    return body(Spread<T, 1, kWarp>{});
  });
}

}  // namespace

int norm_pool_launch(const NormPool& call, const void* x, double eps, void* out, void* stream) {
  return with_spread(call, {x, out}, [&](auto spread) {
    using S = decltype(spread);
    using T = typename S::T;
    using acc_t = typename S::acc_t;
    const Shape<S> shape(call.size);
    auto* kernel = &forward_kernel<S, false>;
    if constexpr (S::kWide > 1) {
      if (shape.held) kernel = &forward_kernel<S, true>;
    }
    const Planes planes = shape.planes;
    const acc_t* const weight = static_cast<const acc_t*>(call.weight);
    const acc_t* const bias = static_cast<const acc_t*>(call.bias);
    const acc_t added = static_cast<acc_t>(eps);
    acc_t* const statistics = static_cast<acc_t*>(call.statistics);
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(out);
    return DMFAST_LAUNCH(kernel, shape.blocks, shape.threads, stream, planes, weight, bias, added,
                         statistics, from, to);
  });
}

int norm_pool_backward_launch(const NormPool& call, const void* gradient, const void* x,
                              void* x_gradient, void* sums, void* stream) {
  return with_spread(call, {gradient, x, x_gradient}, [&](auto spread) {
    using S = decltype(spread);
    using T = typename S::T;
    using acc_t = typename S::acc_t;
    const Shape<S> shape(call.size);
    auto* kernel = &backward_kernel<S, false>;
    if constexpr (S::kWide > 1) {
      if (shape.held) kernel = &backward_kernel<S, true>;
    }
    const Planes planes = shape.planes;
    const acc_t* const weight = static_cast<const acc_t*>(call.weight);
    const acc_t* const bias = static_cast<const acc_t*>(call.bias);
    const acc_t* const statistics = static_cast<const acc_t*>(call.statistics);
    const T* const of_out = static_cast<const T*>(gradient);
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(x_gradient);
    acc_t* const of_images = static_cast<acc_t*>(sums);
    return DMFAST_LAUNCH(kernel, shape.blocks, shape.threads, stream, planes, weight, bias,
                         statistics, of_out, from, to, of_images);
  });
}

int norm_pool_parameter_gradient_launch(const NormPool& call, const void* sums, void* of_weight,
                                        void* of_bias, void* stream) {
  return with_cuda_type(call.dtype, [&](auto element) {
    using acc_t = typename Accumulator<decltype(element)>::type;
    const int64_t networks = call.size.networks, channels = call.size.channels;
    const int64_t images = call.size.images / networks;
    const acc_t* const from = static_cast<const acc_t*>(sums);
    acc_t *const weight = static_cast<acc_t*>(of_weight), *const bias =
                                                              static_cast<acc_t*>(of_bias);
    const int64_t tasks = networks * ((channels + kWarp - 1) / kWarp) * 2;
    return DMFAST_LAUNCH(parameter_gradient_kernel<acc_t>, grid(tasks), dim3(kWarp, kSumLanes),
                         stream, from, networks, images, channels, weight, bias);
  });
}

}  // namespace dmfast

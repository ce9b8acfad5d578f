// SPDX-License-Identifier: MIT
// The augmentation operators on a GPU. A block takes a tile of an image, which is all of it up to
// kTilePixels; a thread takes pixels with all their channels. Nothing between the transforms is
// stored: an output pixel asks for its samples of the scaled image, each of those for its samples
// of the shifted one, and the adjoint likewise asks backwards. All blocks run the same code
// whatever their group drew, and what is drawn for a whole group is worked out once a block.
//
// The mean that contrast is about takes a pass of its own over the image: by the same block where
// it has all of it; else by a launch before, which leaves one sum a tile.
#include <cmath>
#include <type_traits>

#include "augment_cuda.h"
#include "augment_pixel_cuda.h"
#include "clamped_groups.h"
#include "cuda_host.h"
#include "cuda_types.h"

namespace dmfast {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kTilePixels = 4096;

int64_t tiles_of(ImageSize size) {
  return (size.height * size.width + kTilePixels - 1) / kTilePixels;
}

// ---- The kernel --------------------------------------------------------------------------------

// Sum over the block, the same in every thread and every run; partial has a place for each warp.
__device__ double block_sum(double value, double* partial) {
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xFFFFFFFF, value, distance);
  }
  __syncthreads();  // partial has been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
  return sum;
}

// Calls visit(y, x) for the pixels of the block's tile that are this thread's, with one division
// for all of them.
template <typename acc_t, typename Visit>
__device__ void for_each_pixel(const Plan<acc_t>& plan, int height, int width, const Visit& visit) {
  const int step = static_cast<int>(blockDim.x), rows = step / width, columns = step % width;
  const int64_t left = static_cast<int64_t>(height) * width - plan.tile * kTilePixels;
  const int count = static_cast<int>(left < kTilePixels ? left : kTilePixels);
  int i = static_cast<int>(threadIdx.x);
  int x = plan.column + i, y = plan.row + x / width;
  x %= width;
  DMFAST_ROLLED
  for (; i < count; i += step) {
    visit(y, x);
    y += rows;
    x += columns;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
}

struct Work {
  ClampedGroups groups;
  const float* params;
  int channels, height, width;
  int64_t tiles;  // of an image
  double* sums;   // [images, tiles], or null where tiles is 1
  bool only_sums;
  bool packs;  // both sides are contiguous NCHW, and packs of pixels are aligned
};

// Images that stay where they are: packs of adjacent pixels, loaded and stored whole.
template <typename acc_t, typename Walk, typename Out>
__device__ void map_packs(const Walk& walk, const Work& work, Out* to) {
  constexpr int kWide = kPack<Out>;
  using Packed = Pack<Out, kWide>;
  const int64_t pixels = static_cast<int64_t>(work.height) * work.width;
  const int64_t first = walk.plan.tile * kTilePixels;
  const int64_t last = first + kTilePixels < pixels ? first + kTilePixels : pixels;
  const bool recolors = walk.plan.kind == Kind::kTransform;
  DMFAST_ROLLED
  for (int64_t p = first + threadIdx.x * kWide; p < last; p += blockDim.x * kWide) {
    Packed packed[kChannels];
    DMFAST_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (c < work.channels) {
        packed[c] = *reinterpret_cast<const Packed*>(walk.image + c * pixels + p);
      }
    }
    DMFAST_UNROLL
    for (int i = 0; i < kWide; ++i) {
      if (!recolors) break;
      Values<acc_t> values = Values<acc_t>::zero();
      DMFAST_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        if (c < work.channels) values.v[c] = static_cast<acc_t>(packed[c].element[i]);
      }
      values = walk.recolored(values);
      DMFAST_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        if (c < work.channels) packed[c].element[i] = static_cast<Out>(values.v[c]);
      }
    }
    DMFAST_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (c < work.channels) *reinterpret_cast<Packed*>(to + c * pixels + p) = packed[c];
    }
  }
}

// Images of zeros or NaN, and those that no column changes: the latter not by way of acc_t, which
// loses the bits of some NaN.
template <typename acc_t, typename Walk, typename Out>
__device__ void fill_or_copy(const Walk& walk, const Work& work, const Strides& stride, Out* to) {
  const Out value = static_cast<Out>(walk.plan.kind == Kind::kNaN ? static_cast<acc_t>(NAN) : 0);
  const bool copies = walk.plan.kind == Kind::kCopy;
  for_each_pixel(walk.plan, work.height, work.width, [&](int y, int x) {
    DMFAST_ROLLED
    for (int c = 0; c < work.channels; ++c) {
      Out& element = to[stride.at(c, y, x)];
      if constexpr (Walk::kPlain) {
        element = copies ? walk.image[walk.source.stride.at(c, y, x)] : value;
      } else {
        element = value;
      }
    }
  });
}

// Blocks that an SM is to hold. With four, ptxas keeps to 128 registers: the kernels that gather
// can, but for those in double; most others would spill.
template <typename Source, typename Out>
constexpr int kBlocks = !Source::kPlain && !std::is_same<Out, double>::value ? 4 : 1;

template <template <typename, typename> class WalkOf, typename Source, typename Out>
__global__ void __launch_bounds__(kThreads, (kBlocks<Source, Out>))
    augment_kernel(const Source source, Out* const output, const Strides stride, const Work work) {
  using acc_t = typename Accumulator<Out>::type;
  using Walk = WalkOf<Source, acc_t>;
  DMFAST_SHARED(Plan<acc_t>, plan, 1);
  DMFAST_SHARED(double, partial, kThreads / 32);
  DMFAST_SHARED(float, table, Source::kLooksUp ? kChannels * kLookups : 1);
  const bool looks_up = Source::kLooksUp && work.channels <= kChannels;
  if (looks_up) source.fill(table, work.channels);
  const int64_t tasks = work.groups.rows * work.tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    __syncthreads();  // the plan of the task before has been read
    if (threadIdx.x == 0) {
      plan->image = task / work.tiles;
      plan->tile = task % work.tiles;
      plan->row = static_cast<int>(plan->tile * kTilePixels / work.width);
      plan->column = static_cast<int>(plan->tile * kTilePixels % work.width);
      const int64_t group = work.groups.of(plan->image);
      plan->fill(group < 0 ? nullptr : work.params + group * kColumns, work.height, work.width);
    }
    __syncthreads();
    const int64_t n = plan->image;
    Out* const to = output + n * stride.n;
    Walk walk{
        {source, source.image(n), *plan, looks_up ? table : nullptr, work.channels, false, 0}};

    const Kind kind = plan->kind;
    const bool packs =
        work.packs && (kind == Kind::kCopy || (kind == Kind::kTransform && !plan->moves()));
    const bool transforms = kind == Kind::kTransform || (kind == Kind::kCopy && !Walk::kPlain);
    const bool contrasts = transforms && plan->color.contrasts();
    const bool summed = work.sums != nullptr && !work.only_sums;
    double sum = 0;
    if (contrasts && summed) {
      DMFAST_ROLLED
      for (int64_t i = threadIdx.x; i < work.tiles; i += blockDim.x) {
        sum += work.sums[n * work.tiles + i];
      }
    }
    // What the contrast's mean is taken of is summed in a first pass, unless a launch before has;
    // the second writes. They share one copy of the code, which keeps it and its registers few.
    DMFAST_ROLLED
    for (int pass = contrasts && !summed ? 0 : 1; pass < (work.only_sums ? 1 : 2); ++pass) {
      const bool summing = pass == 0;
      if (contrasts && !summing) {
        const double elements = static_cast<double>(work.height) * work.width * work.channels;
        walk.contrast_mean = static_cast<acc_t>(block_sum(sum, partial) / elements);
        walk.contrasts = true;
      }
      if (!summing && !transforms && !packs) fill_or_copy<acc_t>(walk, work, stride, to);
      if constexpr (Walk::kPlain) {
        if (!summing && packs) map_packs<acc_t>(walk, work, to);
      }
      if (!summing && (!transforms || packs)) break;
      for_each_pixel(*plan, work.height, work.width, [&](int y, int x) {
        acc_t of_pixel = 0;
        walk.pixel(y, x, summing, [&](int c0, const Values<acc_t>& values) {
          if (summing) {
            walk.sum_channels(values, c0, &of_pixel);
            return;
          }
          DMFAST_UNROLL
          for (int i = 0; i < kChannels; ++i) {
            if (c0 + i < work.channels) {
              to[stride.at(c0 + i, y, x)] = static_cast<Out>(values.v[i]);
            }
          }
        });
        sum += of_pixel;
      });
    }
    if (work.only_sums && contrasts) {
      sum = block_sum(sum, partial);
      if (threadIdx.x == 0) work.sums[task] = sum;
    }
  }
}

// ---- Launches ----------------------------------------------------------------------------------

Strides strides(const Images& images) { return {images.sn, images.sc, images.sy, images.sx}; }

// Whether packs of pixels may be loaded and stored whole.
template <typename T>
bool takes_packs(const Images& images, ImageSize size) {
  const int64_t pixels = size.height * size.width;
  return size.channels <= kChannels && pixels % kPack<T> == 0 && is_aligned(images.data, 16) &&
         images.sx == 1 && images.sy == size.width && images.sc == pixels &&
         images.sn % kPack<T> == 0;
}

template <template <typename, typename> class Walk, typename Out, typename Source>
int launch(const Source& source, const Images& to, ImageSize size, const Rows& rows, bool packs,
           double* sums, void* stream) {
  const int64_t pixels = size.height * size.width, tiles = tiles_of(size);
  if (rows.images * pixels * size.channels == 0) return 0;
  Work work{{rows.offsets, rows.groups, rows.images},
            rows.params,
            static_cast<int>(size.channels),
            static_cast<int>(size.height),
            static_cast<int>(size.width),
            tiles,
            tiles > 1 ? sums : nullptr,
            false,
            packs};
  const unsigned threads = pixels <= 64 ? 64 : kThreads;
  const int64_t tasks = rows.images * tiles;
  const unsigned blocks = static_cast<unsigned>(tasks < INT32_MAX ? tasks : INT32_MAX);
  Out* const output = static_cast<Out*>(to.data);
  const auto kernel = augment_kernel<Walk, Source, Out>;
  if (tiles > 1) {
    work.only_sums = true;
    const int error =
        DMFAST_LAUNCH(kernel, blocks, threads, stream, source, output, strides(to), work);
    if (error != 0) return error;
    work.only_sums = false;
  }
  return DMFAST_LAUNCH(kernel, blocks, threads, stream, source, output, strides(to), work);
}

template <template <typename, typename> class Walk>
int map(const Images& x, const Images& y, ImageSize size, const Rows& rows, double* sums,
        void* stream) {
  return with_cuda_type(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Batch<T> source{static_cast<const T*>(x.data), strides(x)};
    const bool packs = takes_packs<T>(x, size) && takes_packs<T>(y, size);
    return launch<Walk, T>(source, y, size, rows, packs, sums, stream);
  });
}

}  // namespace

int64_t augment_workspace(ImageSize size) { return tiles_of(size) > 1 ? tiles_of(size) : 0; }

int siamese_augment_launch(const Images& x, const Images& y, ImageSize size, const Rows& rows,
                           double* sums, void* stream) {
  return map<Forward>(x, y, size, rows, sums, stream);
}

int siamese_augment_backward_launch(const Images& y_gradient, const Images& x_gradient,
                                    ImageSize size, const Rows& rows, double* sums, void* stream) {
  return map<Adjoint>(y_gradient, x_gradient, size, rows, sums, stream);
}

int gather_augment_launch(const Images& images, int64_t count, const int64_t* index,
                          const Normalisation& normalisation, const Images& y, ImageSize size,
                          const Rows& rows, double* sums, void* stream) {
  return with_cuda_type(y.dtype, [&](auto element) {
    using Out = decltype(element);
    const auto from = [&](auto pixel) {
      using T = decltype(pixel);
      const Gathered<T> source{static_cast<const T*>(images.data),
                               strides(images),
                               index,
                               count,
                               normalisation.mean,
                               normalisation.std};
      return launch<Forward, Out>(source, y, size, rows, false, sums, stream);
    };
    return images.dtype == DType::kUInt8 ? from(uint8_t{}) : from(float{});
  });
}

}  // namespace dmfast

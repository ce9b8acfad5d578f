// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>

#include "cuda_host.h"
#include "norm_pool.h"
#include "wide_block_cuda.h"
#include "wide_tile_cuda.h"

namespace dmfast {
namespace {

template <int kSide>
__global__ void __launch_bounds__(256, 1)
    wide_forward_kernel(const Wide block, const BFloat16* const x, const Cell* const packed,
                        const FusedNorm norm, BFloat16* const out, float* const statistics) {
  using Tile = WideTile<kSide>;
  DMFAST_SHARED_BYTES(shared);
  Cell* const cells = reinterpret_cast<Cell*>(shared);
  Cell* const ring = cells + block.groups() * Tile::kPlane;
  const WidePlace at = WidePlace::of_thread();
  const int chunks_of_block = static_cast<int>(blockDim.x) / 128;
  const int parts = block.chunks / chunks_of_block;
  const int chunk = static_cast<int>(blockIdx.x) % parts * chunks_of_block + at.chunk;
  const TileImages images = TileImages::of<kSide>(block, static_cast<int>(blockIdx.x) / parts);

  const int64_t image_size = int64_t{kSide * kSide * 8} << block.log2_groups;
  fetch_images<kSide>(cells, x + images.first * image_size, block.log2_groups, images.count,
                      block.groups());
  const Cell* const weights =
      packed + (int64_t{images.network} * block.chunks + chunk) * block.chunk_cells();
  float sums[4][kWideTiles][4] = {};
  convolve<kSide>(sums, cells, ring, chunks_of_block, weights, block.groups());
  __syncthreads();  // the ring has been read

  float* scratch = reinterpret_cast<float*>(ring) + at.chunk * 4 * kWideColumns;
  const int scratch_of_sum = chunks_of_block * 4 * kWideColumns;
  const int filter = chunk * kWideColumns + at.filter();
  const bool is_filter = filter < block.filters;
  DMFAST_UNROLL
  for (int part = 0; part < Tile::kWarpImages; ++part) {
    const int first = part * Tile::kTilesOfImage, last = first + Tile::kTilesOfImage;
    constexpr float kShare = 1.0f / (kSide * kSide);
    float mean[16] = {}, factor[16] = {};
    DMFAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      DMFAST_UNROLL
      for (int m = first; m < last; ++m)
        mean[i] += sums[m][i / 2][i % 2] + sums[m][i / 2][i % 2 + 2];
    }
    leave_sums(mean, scratch);
    image_barrier<kSide>();
    read_sums<kSide>(mean, scratch, 0);
    scratch += scratch_of_sum;
    DMFAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      mean[i] *= kShare;
      DMFAST_UNROLL
      for (int m = first; m < last; ++m) {
        DMFAST_UNROLL
        for (int e = i % 2; e < 4; e += 2) {
          float& value = sums[m][i / 2][e];
          value -= mean[i];
          factor[i] += value * value;
        }
      }
    }
    leave_sums(factor, scratch);
    image_barrier<kSide>();
    read_sums<kSide>(factor, scratch, 0);
    scratch += scratch_of_sum;
    DMFAST_UNROLL
    for (int i = 0; i < 16; ++i) factor[i] = 1.0f / sqrtf(factor[i] * kShare + block.eps);
    const int image = Tile::image_of(at.warp, first);
    const bool writes = at.x() == 0 && (!Tile::kImageOfBlock || at.warp == 0);
    if (statistics && writes && is_filter && image < images.count) {
      float* const to = statistics + (images.first + image) * 2 * block.filters + filter;
      store_floats(to, mean);
      store_floats(to + block.filters, factor);
    }
    float weight[16] = {}, bias[16] = {};
    if (is_filter) {
      const FusedNorm of_network = norm.of_network(images.network);
      load_parameter(weight, of_network.weight, filter, 1.0f);
      load_parameter(bias, of_network.bias, filter, 0.0f);
    }
    DMFAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      factor[i] *= weight[i];
      DMFAST_UNROLL
      for (int m = first; m < last; ++m) {
        float (&value)[4] = sums[m][i / 2];
        value[i % 2] =
            relu(value[i % 2] * factor[i] + bias[i]) + relu(value[i % 2 + 2] * factor[i] + bias[i]);
      }
    }
  }

  // Of two neighbours along x the left one goes on with the first two tiles, the other with the
  // rest.
  const bool right = at.x() % 2 != 0;
  DMFAST_UNROLL
  for (int m = 0; m < 2; ++m) {
    float pooled[16];
    DMFAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      const float early = sums[m][i / 2][i % 2], late = sums[m + 2][i / 2][i % 2];
      const float other = __shfl_xor_sync(kAllLanes, right ? early : late, 4);
      pooled[i] = 0.25f * ((right ? late : early) + other);
    }
    const int tile = right ? m + 2 : m, image = Tile::image_of(at.warp, tile);
    if (is_filter && image < images.count) {
      const int64_t place =
          (images.first + image) * (kSide * kSide / 4) + Tile::pooled_place(at.warp, tile, at.x());
      store_cells(reinterpret_cast<Cell*>(out + place * block.filters + filter), 1, pooled);
    }
  }
}

// Some of a lane's filters in the norm, and the gradient of what its tiles are pooled to: few, for
// registers are.
constexpr int kFew = 4;

template <int kTilesOfImage>
struct FewFilters {
  float mean[kFew], rstd[kFew], weight[kFew], bias[kFew];
  Pack<uint32_t, kFew / 2> gradient[kTilesOfImage];

  // With its share in the mean of four.
  __device__ __forceinline__ float shared_gradient(int tile, int i) const {
    const uint32_t pair = gradient[tile].element[i / 2];
    return 0.25f * (i % 2 ? high_of_pair(pair) : low_of_pair(pair));
  }
  // Of y, from the normalised z.
  __device__ __forceinline__ float passed(float normal, int tile, int i) const {
    return relu_gradient(normal * weight[i] + bias[i], shared_gradient(tile, i));
  }
};

// From an image on, so that what is added fits 32 bits; null stays null.
template <typename T>
__device__ __forceinline__ T* from_image(T* all, int64_t first, int size) {
  return all ? all + first * size : nullptr;
}

template <int kSide>
__global__ void __launch_bounds__(256, 1)
    wide_backward_kernel(const Wide block, const int log2_filter_groups, const BFloat16* const x,
                         const Cell* const packed, const Cell* const turned, const FusedNorm norm,
                         const FusedGradients gradients) {
  using Tile = WideTile<kSide>;
  constexpr int kChunks = 2;  // of the block
  constexpr int kScratch = kChunks * 4 * kWideColumns;
  DMFAST_SHARED_BYTES(shared);
  Cell* const cells = reinterpret_cast<Cell*>(shared);
  const int groups = block.groups(), filter_groups = 1 << log2_filter_groups;
  const int channels = 8 * groups;
  const int planes = groups > filter_groups ? groups : filter_groups;
  Cell* const ring = cells + planes * Tile::kPlane;
  const WidePlace at = WidePlace::of_thread();
  const TileImages images = TileImages::of<kSide>(block, static_cast<int>(blockIdx.x));

  const int64_t image_size = int64_t{kSide * kSide * 8} << block.log2_groups;
  fetch_images<kSide>(cells, x + images.first * image_size, block.log2_groups, images.count,
                      planes);
  const Cell* weights = nullptr;
  if (at.chunk < block.chunks) {
    weights = packed + (int64_t{images.network} * block.chunks + at.chunk) * block.chunk_cells();
  }
  float sums[4][kWideTiles][4] = {};
  convolve<kSide>(sums, cells, ring, kChunks, weights, groups);
  __syncthreads();  // the images and the ring have been read

  constexpr int kPositions = kSide * kSide;
  const float* const all_statistics =
      from_image(gradients.statistics, images.first, 2 * block.filters);
  float* const norm_gradients =
      from_image(gradients.norm_gradients, images.first, 2 * block.filters);
  const BFloat16* const pooled = from_image(static_cast<const BFloat16*>(gradients.out_gradient),
                                            images.first, kPositions / 4 * block.filters);
  float* scratch = reinterpret_cast<float*>(ring) + at.chunk * 4 * kWideColumns;
  const int filter = at.chunk * kWideColumns + at.filter();
  const bool is_filter = filter < block.filters;
  DMFAST_UNROLL
  for (int part = 0; part < Tile::kWarpImages; ++part) {
    constexpr int kTilesOfImage = Tile::kTilesOfImage;
    constexpr float kShare = 1.0f / (kSide * kSide);
    const int first = part * kTilesOfImage, image = Tile::image_of(at.warp, first);
    const bool is_there = is_filter && image < images.count;
    // What is not there is read from what is: nothing comes of it, and no branch is needed.
    const int image_read = image < images.count ? image : images.count - 1;
    const int filter_read = is_filter ? filter : 0;
    const auto load = [&](int column) {
      __syncwarp();  // the compiler must not load earlier: it would run out of registers
      FewFilters<kTilesOfImage> filters;
      const int from = filter_read + column;
      const float* const statistics = all_statistics + image_read * 2 * block.filters + from;
      load_floats(filters.mean, statistics);
      load_floats(filters.rstd, statistics + block.filters);
      const FusedNorm of_network = norm.of_network(images.network);
      load_parameter(filters.weight, of_network.weight, from, 1.0f);
      load_parameter(filters.bias, of_network.bias, from, 0.0f);
      DMFAST_UNROLL
      for (int m = 0; m < kTilesOfImage; ++m) {
        const int place =
            image_read * (kSide * kSide / 4) + Tile::pooled_place(at.warp, first + m, at.x());
        filters.gradient[m] = *reinterpret_cast<const Pack<uint32_t, kFew / 2>*>(
            pooled + place * block.filters + from);
      }
      return filters;
    };
    // The means over the image of the gradient of y, and of its product with the normalised z.
    float of_bias[16] = {}, of_weight[16] = {};
    DMFAST_UNROLL
    for (int column = 0; column < 16; column += kFew) {
      const FewFilters<kTilesOfImage> filters = load(column);
      DMFAST_UNROLL
      for (int i = 0; i < kFew; ++i) {
        DMFAST_UNROLL
        for (int m = 0; m < kTilesOfImage; ++m) {
          DMFAST_UNROLL
          for (int e = i % 2; e < 4; e += 2) {
            float& value = sums[first + m][(column + i) / 2][e];
            value = (value - filters.mean[i]) * filters.rstd[i];
            const float passed = filters.passed(value, m, i);
            of_bias[column + i] += passed;
            of_weight[column + i] += passed * value;
          }
        }
      }
    }
    leave_sums(of_weight, scratch);
    leave_sums(of_bias, scratch + kScratch);
    image_barrier<kSide>();
    const bool writes = at.x() == 0 && (!Tile::kImageOfBlock || at.warp == 0);
    DMFAST_UNROLL
    for (int column = 0; column < 16; column += kFew) {
      const FewFilters<kTilesOfImage> filters = load(column);
      float weight_sum[kFew], bias_sum[kFew];
      read_sums<kSide>(weight_sum, scratch, column);
      read_sums<kSide>(bias_sum, scratch + kScratch, column);
      if (norm_gradients && writes && is_there) {
        float* const to = norm_gradients + image * 2 * block.filters + filter + column;
        store_floats(to, weight_sum);
        store_floats(to + block.filters, bias_sum);
      }
      DMFAST_UNROLL
      for (int i = 0; i < kFew; ++i) {
        const float factor = filters.rstd[i] * filters.weight[i];
        const float weight_mean = weight_sum[i] * kShare, bias_mean = bias_sum[i] * kShare;
        DMFAST_UNROLL
        for (int m = 0; m < kTilesOfImage; ++m) {
          DMFAST_UNROLL
          for (int e = i % 2; e < 4; e += 2) {
            float& value = sums[first + m][(column + i) / 2][e];
            value = factor * (filters.passed(value, m, i) - bias_mean - value * weight_mean);
          }
        }
      }
    }
    scratch += 2 * kScratch;
  }

  // The gradient of z takes the place of the images.
  if (is_filter) {
    Cell* const to = cells + filter / 8 * Tile::kPlane + Tile::kPitch + 1;
    DMFAST_UNROLL
    for (int m = 0; m < 4; ++m) {
      DMFAST_UNROLL
      for (int lower = 0; lower < 2; ++lower) {
        float values[16];
        DMFAST_UNROLL
        for (int i = 0; i < 16; ++i) values[i] = sums[m][i / 2][i % 2 + 2 * lower];
        const int row = at.x() + 8 * lower;
        store_cells(to + Tile::first_cell(at.warp, row) + Tile::tile_cell(m), Tile::kPlane, values);
      }
    }
  }
  if (gradients.conv_gradient) {
    __syncthreads();
    Cell* const of_z = static_cast<Cell*>(gradients.conv_gradient) +
                       (images.first * kPositions << log2_filter_groups);
    write_images<kSide>(of_z, cells, log2_filter_groups, images.count);
  }
  if (!gradients.x_gradient) return;
  Cell* const of_x =
      static_cast<Cell*>(gradients.x_gradient) + (images.first * kPositions << block.log2_groups);

  const int chunks = (channels + kWideColumns - 1) / kWideColumns;
  const int64_t turned_cells = int64_t{9} * filter_groups * kWideColumns;
  DMFAST_ROLLED
  for (int first = 0; first < chunks; first += kChunks) {
    const int chunk = first + at.chunk;
    const Cell* of_chunk = nullptr;
    if (chunk < chunks)
      of_chunk = turned + (int64_t{images.network} * chunks + chunk) * turned_cells;
    DMFAST_UNROLL
    for (int m = 0; m < 4; ++m) {
      DMFAST_UNROLL
      for (int j = 0; j < kWideTiles; ++j) {
        DMFAST_UNROLL
        for (int e = 0; e < 4; ++e) sums[m][j][e] = 0.0f;
      }
    }
    __syncthreads();  // the gradient is there, and what was in the ring has been read
    convolve<kSide>(sums, cells, ring, kChunks, of_chunk, filter_groups);
    const int channel = chunk * kWideColumns + at.filter();
    if (channel >= channels) continue;
    DMFAST_UNROLL
    for (int m = 0; m < 4; ++m) {
      const int image = Tile::image_of(at.warp, m);
      if (image >= images.count) continue;
      DMFAST_UNROLL
      for (int lower = 0; lower < 2; ++lower) {
        float values[16];
        DMFAST_UNROLL
        for (int i = 0; i < 16; ++i) values[i] = sums[m][i / 2][i % 2 + 2 * lower];
        const int place = image * kSide * kSide + Tile::place(at.warp, m, at.x() + 8 * lower);
        store_cells(of_x + (place << block.log2_groups) + channel / 8, 1, values);
      }
    }
  }
}

// ---- Launches ----------------------------------------------------------------------------------

template <typename Body>
int with_side(int64_t side, const Body& body) {
  switch (side) {
    case 4: return body(std::integral_constant<int, 4>{});
    case 8: return body(std::integral_constant<int, 8>{});
    case 16: return body(std::integral_constant<int, 16>{});
    default: return 1;  // cudaErrorInvalidValue
  }
}

}  // namespace

int wide_block_shared_bytes(const FusedBlock& block, int filters_of_block, bool backward) {
  int plane = 0;
  with_side(block.height, [&](auto side) {
    plane = WideTile<decltype(side)::value>::kPlane;
    return 0;
  });
  const int64_t depth = backward ? std::max(block.channels, block.filters) : block.channels;
  const int64_t cells = depth / 8 * plane + kStages * kStagePlanes * filters_of_block;
  return static_cast<int>(cells * sizeof(Cell));
}

int wide_block_forward(const FusedBlock& block, const void* x, const void* packed,
                       const FusedNorm& norm, void* out, float* statistics, void* stream) {
  return with_side(block.height, [&](auto side) {
    constexpr int kSide = decltype(side)::value;
    const Wide wide_block = Wide::of<kSide>(block);
    // Two blocks of 64 filters in a multiprocessor, one of which computes while the other begins or
    // ends, where there is room for two; else one of 128, if there are as many.
    const int half = wide_block_shared_bytes(block, kWideColumns, false);
    const bool two_fit = 2 * (half + 1024) <= multiprocessor_shared_bytes();
    const int whole = wide_block_shared_bytes(block, 2 * kWideColumns, false);
    const bool of_128 =
        !two_fit && block.filters % (2 * kWideColumns) == 0 && whole <= block_shared_bytes();
    constexpr auto kKernel = wide_forward_kernel<kSide>;
    if (const int error = allow_shared_bytes<kKernel>()) return error;
    const int64_t blocks = block.networks * wide_block.tiles_of_network *
                           (of_128 ? wide_block.chunks / 2 : wide_block.chunks);
    const BFloat16* const from = static_cast<const BFloat16*>(x);
    const Cell* const weights = static_cast<const Cell*>(packed);
    BFloat16* const to = static_cast<BFloat16*>(out);
    const FusedNorm parameters = norm;
    return DMFAST_LAUNCH_SHARED(kKernel, static_cast<unsigned>(blocks), of_128 ? 256 : 128,
                                of_128 ? whole : half, stream, wide_block, from, weights,
                                parameters, to, statistics);
  });
}

int wide_block_backward(const FusedBlock& block, const void* x, const void* packed,
                        const void* turned, const FusedNorm& norm, const FusedGradients& gradients,
                        void* stream) {
  const auto launch = [&](auto side) {
    constexpr int kSide = decltype(side)::value;
    constexpr auto kKernel = wide_backward_kernel<kSide>;
    if (const int error = allow_shared_bytes<kKernel>()) return error;
    const Wide wide_block = Wide::of<kSide>(block);
    const int64_t blocks = block.networks * wide_block.tiles_of_network;
    const int log2_filter_groups = Wide::log2_of(block.filters / 8);
    const BFloat16* const from = static_cast<const BFloat16*>(x);
    const Cell* const weights = static_cast<const Cell*>(packed);
    const Cell* const turned_weights = static_cast<const Cell*>(turned);
    const FusedNorm parameters = norm;
    const FusedGradients of_kernel = gradients;
    return DMFAST_LAUNCH_SHARED(kKernel, static_cast<unsigned>(blocks), 256,
                                wide_block_shared_bytes(block, 2 * kWideColumns, true), stream,
                                wide_block, log2_filter_groups, from, weights, turned_weights,
                                parameters, of_kernel);
  };
  // Four images of 4 x 4 a warp would have more in registers than there are.
  return block.height == 16 ? launch(std::integral_constant<int, 16>{})
                            : launch(std::integral_constant<int, 8>{});
}

}  // namespace dmfast

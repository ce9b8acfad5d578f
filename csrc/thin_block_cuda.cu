// SPDX-License-Identifier: MIT
// A block of threads takes an image, a warp 32 filters of it. Products are short (27 for 3
// channels), so what is costly is what follows them: the convolution is made twice, for the
// statistics and for the result, and no value of it is kept. No warp waits for sums of another.
//
// The image lies in shared memory with its border, and a strip of some lines at a time as im2col,
// in cells of 8 of the depth, [depth / 8][position]. A strip is whole pairs of lines, in tiles of 8
// x 2 positions: see block_tile_cuda.h.
#include <cmath>

#include "block_tile_cuda.h"
#include "cuda_host.h"
#include "norm_pool.h"
#include "thin_block_cuda.h"

namespace dmfast {
namespace {

constexpr int kStripTiles = 16;
constexpr int kStrip = 16 * kStripTiles;  // positions
constexpr int kTiles = kThinFilters / 8;
constexpr int kFilters = 8;  // of a lane

// What the kernels know of a block.
struct Thin {
  int images_of_network;
  int channels, height, width, padding, filters;
  int conv_height, conv_width;
  float eps;

  DMFAST_HD int chunks() const { return filters / kThinFilters; }
  DMFAST_HD int lines() const { return conv_height + 2; }  // of the image with its border
  DMFAST_HD int pitch() const { return (conv_width + 2) * channels; }  // elements of a line
  DMFAST_HD int tile_columns() const { return conv_width / 8; }
  DMFAST_HD int tiles() const { return conv_height / 2 * tile_columns(); }
  // Of a strip, in whole pairs of lines.
  DMFAST_HD int strip_tiles() const { return kStripTiles / tile_columns() * tile_columns(); }
};

// Shared memory, in this order.
struct ThinShared {
  int image_bytes, sums_bytes, strip_bytes;

  DMFAST_HD ThinShared(const Thin& block, int depth)
      : image_bytes((block.lines() * block.pitch() * 2 + 15) / 16 * 16),
        sums_bytes(((block.lines() * 3 * block.channels + depth) * 4 + 15) / 16 * 16),
        strip_bytes(depth / 8 * kStrip * 16) {}

  DMFAST_HD int forward() const { return image_bytes + sums_bytes + strip_bytes; }
};

// The image with zeros around it.
__device__ __forceinline__ void load_image(BFloat16* image, const Thin& block, const BFloat16* x) {
  const int pitch = block.pitch(), channels = block.channels;
  for (int i = static_cast<int>(threadIdx.x); i < block.lines() * pitch;
       i += static_cast<int>(blockDim.x)) {
    const int y = i / pitch - block.padding, inside = i % pitch - block.padding * channels;
    const bool is_inside =
        y >= 0 && y < block.height && inside >= 0 && inside < block.width * channels;
    image[i] = is_inside ? x[y * block.width * channels + inside] : BFloat16(0.0f);
  }
}

// A tile's place in the convolution.
struct TilePlace {
  int y, x;

  __device__ TilePlace(const Thin& block, int tile)
      : y(tile / block.tile_columns() * 2), x(tile % block.tile_columns() * 8) {}
};

// im2col of so many tiles from the first on.
template <int kSteps>
__device__ __forceinline__ void make_strip(Cell* strip, const BFloat16* image, const Thin& block,
                                           int first, int tiles) {
  const int of_line = 3 * block.channels, gap = block.pitch() - of_line;
  for (int position = static_cast<int>(threadIdx.x); position < tiles * 16;
       position += static_cast<int>(blockDim.x)) {
    const TilePlace place(block, first + position / 16);
    const int y = place.y + position / 8 % 2, x = place.x + position % 8;
    const BFloat16* const from = image + y * block.pitch() + x * block.channels;
    DMFAST_UNROLL
    for (int cell = 0; cell < 2 * kSteps; ++cell) {
      Cell values;
      DMFAST_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int depth = cell * 8 + i;
        const int line = (depth >= of_line ? gap : 0) + (depth >= 2 * of_line ? gap : 0);
        values.element[i] = depth < 3 * of_line ? from[depth + line] : BFloat16(0.0f);
      }
      strip[cell * kStrip + position] = values;
    }
  }
}

// For each element of the depth its mean over the positions, so that a filter's product with them
// is its mean. `sums` is the room for them and for those of each line.
__device__ __forceinline__ const float* depth_means(float* sums, const BFloat16* image,
                                                    const Thin& block, int depth) {
  const int channels = block.channels, of_line = 3 * channels;
  float* const means = sums + block.lines() * of_line;
  for (int i = static_cast<int>(threadIdx.x); i < block.lines() * channels;
       i += static_cast<int>(blockDim.x)) {
    const int y = i / channels, channel = i % channels;
    const BFloat16* const line = image + y * block.pitch() + channel;
    const auto at = [&](int x) { return static_cast<float>(line[x * channels]); };
    float common = 0.0f;
    for (int x = 2; x < block.conv_width; ++x) common += at(x);
    const float first = at(1), last = at(block.conv_width);
    float* const to = sums + y * of_line + channel;
    to[0] = at(0) + first + common;
    to[channels] = first + common + last;
    to[2 * channels] = common + last + at(block.conv_width + 1);
  }
  __syncthreads();
  const float share = 1.0f / static_cast<float>(block.conv_height * block.conv_width);
  for (int i = static_cast<int>(threadIdx.x); i < depth; i += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    if (i < 3 * of_line) {
      const float* const from = sums + i / of_line * of_line + i % of_line;
      for (int y = 0; y < block.conv_height; ++y) sum += from[y * of_line];
    }
    means[i] = sum * share;
  }
  __syncthreads();
  return means;
}

// The column of filter i of a lane's.
__device__ __forceinline__ int column_of(int i, int lane) {
  return i / 2 * 8 + lane % 4 * 2 + i % 2;
}

// Of a value that lane 4g + t has for filter 8t + g, those of the lane's own filters.
__device__ __forceinline__ void from_rows(float (&to)[kFilters], float value) {
  const unsigned lane = threadIdx.x % 32;
  DMFAST_UNROLL
  for (int i = 0; i < kFilters; ++i) to[i] = __shfl_sync(kAllLanes, value, 4 * i + lane % 4);
}

__device__ __forceinline__ int filter_of_row(int lane) { return lane % 4 * kFilters + lane / 4; }

// A warp's weights in registers, from packed ones.
template <int kSteps>
struct ThinWeights {
  uint32_t pair[kSteps][kTiles][2];

  __device__ __forceinline__ void load(const Cell* packed) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(packed);
    DMFAST_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      DMFAST_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        DMFAST_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int cell = (2 * step + half) * kThinFilters + j * 8 + lane / 4;
          pair[step][j][half] = words[cell * 4 + lane % 4];
        }
      }
    }
  }
};

// The convolution at a tile of the strip.
template <int kSteps>
__device__ __forceinline__ void convolve_tile(float (&z)[kTiles][4], const Cell* strip, int tile,
                                              const ThinWeights<kSteps>& weights) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  DMFAST_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    DMFAST_UNROLL
    for (int e = 0; e < 4; ++e) z[j][e] = 0.0f;
  }
  DMFAST_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    uint32_t rows[4];
    load_matrices(rows, strip + (2 * step + lane / 16) * kStrip + tile * 16 + lane % 16);
    DMFAST_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      multiply_add(z[j], rows, weights.pair[step][j][0], weights.pair[step][j][1]);
    }
  }
}

// The image's product with a lane's filter, over the positions.
template <int kSteps>
__device__ __forceinline__ float column_mean(const Cell* packed, const float* means) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0.0f;
  DMFAST_UNROLL
  for (int cell = 0; cell < 2 * kSteps; ++cell) {
    const Cell weights = packed[cell * kThinFilters + lane];
    DMFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      sum += static_cast<float>(weights.element[i]) * means[cell * 8 + i];
    }
  }
  return sum;
}

template <int kSteps>
__global__ void __launch_bounds__(256, 2)
    thin_forward_kernel(const Thin block, const BFloat16* const x, const Cell* const packed,
                        const FusedNorm norm, BFloat16* const out, float* const statistics) {
  DMFAST_SHARED_BYTES(shared);
  const ThinShared parts(block, 16 * kSteps);
  BFloat16* const image = reinterpret_cast<BFloat16*>(shared);
  float* const sums = reinterpret_cast<float*>(shared + parts.image_bytes);
  Cell* const strip = reinterpret_cast<Cell*>(shared + parts.image_bytes + parts.sums_bytes);
  const int lane = static_cast<int>(threadIdx.x) % 32, chunk = static_cast<int>(threadIdx.x) / 32;
  const int64_t number = blockIdx.x;
  const int network = static_cast<int>(number / block.images_of_network);
  const Cell* const of_warp =
      packed + (int64_t{network} * block.chunks() + chunk) * 2 * kSteps * kThinFilters;

  load_image(image, block, x + number * block.height * block.width * block.channels);
  ThinWeights<kSteps> weights;
  weights.load(of_warp);
  __syncthreads();
  const float of_column =
      column_mean<kSteps>(of_warp, depth_means(sums, image, block, 16 * kSteps));
  float mean[kFilters];
  DMFAST_UNROLL
  for (int i = 0; i < kFilters; ++i)
    mean[i] = __shfl_sync(kAllLanes, of_column, column_of(i, lane));

  // That mean is right up to rounding; what is left of it comes out of the deviations.
  float deviations[kFilters] = {}, squares[kFilters] = {};
  const int strip_tiles = block.strip_tiles();
  DMFAST_ROLLED
  for (int first = 0; first < block.tiles(); first += strip_tiles) {
    const int tiles = block.tiles() - first < strip_tiles ? block.tiles() - first : strip_tiles;
    if (first > 0) __syncthreads();  // the strip has been read
    make_strip<kSteps>(strip, image, block, first, tiles);
    __syncthreads();
    DMFAST_ROLLED
    for (int tile = 0; tile < tiles; ++tile) {
      float z[kTiles][4];
      convolve_tile(z, strip, tile, weights);
      DMFAST_UNROLL
      for (int i = 0; i < kFilters; ++i) {
        const float upper = z[i / 2][i % 2] - mean[i], lower = z[i / 2][i % 2 + 2] - mean[i];
        deviations[i] += upper + lower;
        squares[i] += upper * upper + lower * lower;
      }
    }
  }
  sum_over_rows(deviations);
  sum_over_rows(squares);
  const int row_filter = chunk * kThinFilters + filter_of_row(lane);
  float factor[kFilters], bias[kFilters];
  {
    // Of the filter whose sums the lane has.
    const float estimate = __shfl_sync(kAllLanes, of_column, column_of(lane / 4, lane));
    const float count = static_cast<float>(block.conv_height * block.conv_width);
    const Moments<float> moments(estimate, deviations[0], squares[0], count);
    const float rstd = 1.0f / sqrtf(moments.variance + block.eps);
    if (statistics) {
      float* const to = statistics + number * 2 * block.filters + row_filter;
      to[0] = moments.mean;
      to[block.filters] = rstd;
    }
    const FusedNorm of_network = norm.of_network(network);
    const float weight = of_network.weight ? of_network.weight[row_filter] : 1.0f;
    from_rows(mean, moments.mean);
    from_rows(factor, rstd * weight);
    from_rows(bias, of_network.bias ? of_network.bias[row_filter] : 0.0f);
  }

  const int filter = chunk * kThinFilters + lane % 4 * kFilters;
  const bool right = lane / 4 % 2 != 0;
  BFloat16* const to =
      out + number * (block.conv_height / 2) * (block.conv_width / 2) * block.filters + filter;
  DMFAST_ROLLED
  for (int first = 0; first < block.tiles(); first += strip_tiles) {
    const int tiles = block.tiles() - first < strip_tiles ? block.tiles() - first : strip_tiles;
    if (block.tiles() > strip_tiles) {
      __syncthreads();  // the strip has been read
      make_strip<kSteps>(strip, image, block, first, tiles);
      __syncthreads();
    }
    // Two tiles at a time: of two neighbours along x the left one goes on with the first tile.
    DMFAST_ROLLED
    for (int tile = 0; tile < tiles; tile += 2) {
      float pooled[2][kFilters];
      DMFAST_UNROLL
      for (int m = 0; m < 2; ++m) {
        float z[kTiles][4];
        convolve_tile(z, strip, tile + m < tiles ? tile + m : tile, weights);
        DMFAST_UNROLL
        for (int i = 0; i < kFilters; ++i) {
          const float upper = (z[i / 2][i % 2] - mean[i]) * factor[i] + bias[i];
          const float lower = (z[i / 2][i % 2 + 2] - mean[i]) * factor[i] + bias[i];
          pooled[m][i] = relu(upper) + relu(lower);
        }
      }
      DMFAST_UNROLL
      for (int i = 0; i < kFilters; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, right ? pooled[0][i] : pooled[1][i], 4);
        pooled[0][i] = 0.25f * ((right ? pooled[1][i] : pooled[0][i]) + other);
      }
      const int mine = tile + (right ? 1 : 0);
      if (mine < tiles) {
        const TilePlace place(block, first + mine);
        const int64_t at = place.y / 2 * (block.conv_width / 2) + (place.x + lane / 4) / 2;
        store_cells(reinterpret_cast<Cell*>(to + at * block.filters), 1, pooled[0]);
      }
    }
  }
}

// ---- The gradient ------------------------------------------------------------------------------

// What a filter's value d beside its mean becomes: y = factor d + bias before ReLU, and from the
// gradient of y that of z, which is factor (gradient) + slope d + term.
struct FilterTables {
  float *mean, *factor, *bias, *slope, *term;  // [filters] each

  __device__ FilterTables(float* all, int filters)
      : mean(all),
        factor(all + filters),
        bias(all + 2 * filters),
        slope(all + 3 * filters),
        term(all + 4 * filters) {}
};

// Shared memory of the backward, in this order: image and strip as forward, weights in both forms,
// tables, the gradient of the strip as im2col has it, [position][depth], and that of the image.
struct ThinBackwardShared {
  int pitch;  // of the strip's gradient: neighbouring positions and channels share no bank
  int image_bytes, strip_bytes, weights_bytes, table_bytes, columns_bytes, gradient_bytes;

  DMFAST_HD ThinBackwardShared(const Thin& block, int depth)
      : pitch(depth + 3),
        image_bytes(ThinShared(block, depth).image_bytes),
        strip_bytes(ThinShared(block, depth).strip_bytes),
        weights_bytes(block.filters * depth * 2),
        table_bytes(5 * block.filters * 4),
        columns_bytes(kStrip * pitch * 4),
        gradient_bytes(block.height * block.width * block.channels * 4) {}

  DMFAST_HD int bytes() const {
    return image_bytes + strip_bytes + 2 * weights_bytes + table_bytes + columns_bytes +
           gradient_bytes;
  }
};

// Tiles of 16 x 8 weights for a warp, from [planes][columns] in shared memory: those of planes 2 i
// and 2 i + 1 and columns 8j to 8j + 7.
template <int kColumns>
__device__ __forceinline__ void load_weights(uint32_t (&pairs)[kColumns / 8][2], const Cell* from,
                                             int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  DMFAST_UNROLL
  for (int j = 0; j < kColumns / 8; j += 2) {
    uint32_t loaded[4];
    load_matrices(loaded,
                  from + (2 * i + lane / 8 % 2) * kColumns + (j + lane / 16) * 8 + lane % 8);
    pairs[j][0] = loaded[0];
    pairs[j][1] = loaded[1];
    pairs[j + 1][0] = loaded[2];
    pairs[j + 1][1] = loaded[3];
  }
}

// Adds to the image's gradient what the strip's columns, whose lines are `first` to `last` - 1,
// hold of it. Each element is one thread's, which adds in the order of the taps.
__device__ __forceinline__ void add_columns(float* gradient, const float* columns, int pitch,
                                            const Thin& block, int first, int last) {
  const int line = block.width * block.channels;
  for (int i = static_cast<int>(threadIdx.x); i < (last + 2 - first) * line;
       i += static_cast<int>(blockDim.x)) {
    const int u = first + i / line, v = i % line / block.channels + block.padding;
    const int channel = i % block.channels, y_of_image = u - block.padding;
    if (y_of_image < 0 || y_of_image >= block.height) continue;
    float sum = 0.0f;
    DMFAST_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int y = u - tap / 3 - first, x = v - tap % 3;
      if (y < 0 || y >= last - first || x < 0 || x >= block.conv_width) continue;
      const int tile = y / 2 * block.tile_columns() + x / 8;
      const int position = tile * 16 + y % 2 * 8 + x % 8;
      sum += columns[position * pitch + tap * block.channels + channel];
    }
    gradient[y_of_image * line + i % line] += sum;
  }
}

template <int kSteps>
__global__ void __launch_bounds__(256, 1)
    thin_backward_kernel(const Thin block, const BFloat16* const x, const Cell* const packed,
                         const Cell* const turned, const FusedNorm norm,
                         const FusedGradients gradients) {
  constexpr int kDepth = 16 * kSteps;
  DMFAST_SHARED_BYTES(shared);
  const ThinBackwardShared parts(block, kDepth);
  BFloat16* const image = reinterpret_cast<BFloat16*>(shared);
  Cell* const strip = reinterpret_cast<Cell*>(shared + parts.image_bytes);
  Cell* const weights_here = strip + parts.strip_bytes / 16;
  Cell* const turned_here = weights_here + parts.weights_bytes / 16;
  float* const all_tables = reinterpret_cast<float*>(turned_here + parts.weights_bytes / 16);
  const FilterTables tables(all_tables, block.filters);
  float* const columns = all_tables + 5 * block.filters;
  float* const gradient = columns + parts.columns_bytes / 4;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t number = blockIdx.x;
  const int network = static_cast<int>(number / block.images_of_network);
  const int image_size = block.height * block.width * block.channels;
  const int chunk_cells = 2 * kSteps * kThinFilters, strip_tiles = block.strip_tiles();
  const int64_t weights_cells = int64_t{network} * block.chunks() * chunk_cells;
  const int64_t positions = block.conv_height * block.conv_width;
  const BFloat16* const pooled = static_cast<const BFloat16*>(gradients.out_gradient) +
                                 number * (positions / 4) * block.filters;
  // Of a lane's pair of positions in a tile, the gradient of what it is pooled to.
  const auto pooled_gradient = [&](int tile, int filter) {
    const TilePlace place(block, tile);
    const int at = place.y / 2 * (block.conv_width / 2) + (place.x + lane / 4) / 2;
    return *reinterpret_cast<const Words*>(pooled + int64_t{at} * block.filters + filter);
  };
  const auto element = [](const Words& words, int i) {
    const uint32_t pair = words.element[i / 2];
    return 0.25f * (i % 2 ? high_of_pair(pair) : low_of_pair(pair));
  };

  load_image(image, block, x + number * image_size);
  for (int i = thread; i < block.chunks() * chunk_cells; i += static_cast<int>(blockDim.x)) {
    copy_async(weights_here + i, packed + weights_cells + i);
    if (gradients.x_gradient) copy_async(turned_here + i, turned + weights_cells + i);
  }
  commit_copies();
  for (int i = thread; i < image_size; i += static_cast<int>(blockDim.x)) gradient[i] = 0.0f;
  {
    const int filter = thread;  // there are as many
    const float* const statistics = gradients.statistics + number * 2 * block.filters + filter;
    const FusedNorm of_network = norm.of_network(network);
    tables.mean[filter] = statistics[0];
    tables.factor[filter] =
        statistics[block.filters] * (of_network.weight ? of_network.weight[filter] : 1.0f);
    tables.bias[filter] = of_network.bias ? of_network.bias[filter] : 0.0f;
  }
  wait_for_copies<0>();
  __syncthreads();

  // First the sums over the image, a warp's of its filters.
  float of_weight[kFilters] = {}, of_bias[kFilters] = {};
  {
    const int filter = warp * kThinFilters + lane % 4 * kFilters;
    ThinWeights<kSteps> weights;
    weights.load(weights_here + warp * chunk_cells);
    float mean[kFilters], factor[kFilters], bias[kFilters];
    load_floats(mean, tables.mean + filter);
    load_floats(factor, tables.factor + filter);
    load_floats(bias, tables.bias + filter);
    DMFAST_ROLLED
    for (int first = 0; first < block.tiles(); first += strip_tiles) {
      const int tiles = block.tiles() - first < strip_tiles ? block.tiles() - first : strip_tiles;
      if (first > 0) __syncthreads();  // the strip has been read
      make_strip<kSteps>(strip, image, block, first, tiles);
      __syncthreads();
      DMFAST_ROLLED
      for (int tile = 0; tile < tiles; ++tile) {
        const Words of_pooled = pooled_gradient(first + tile, filter);
        float z[kTiles][4];
        convolve_tile(z, strip, tile, weights);
        DMFAST_UNROLL
        for (int i = 0; i < kFilters; ++i) {
          DMFAST_UNROLL
          for (int e = i % 2; e < 4; e += 2) {
            const float beside = z[i / 2][e] - mean[i];
            const float passed = relu_gradient(beside * factor[i] + bias[i], element(of_pooled, i));
            of_bias[i] += passed;
            of_weight[i] += passed * beside;
          }
        }
      }
    }
  }
  sum_over_rows(of_weight);
  sum_over_rows(of_bias);
  {
    const int filter = warp * kThinFilters + filter_of_row(lane);
    const float rstd = gradients.statistics[(number * 2 + 1) * block.filters + filter];
    const float weight_sum = of_weight[0] * rstd, bias_sum = of_bias[0];
    if (gradients.norm_gradients) {
      float* const to = gradients.norm_gradients + number * 2 * block.filters + filter;
      to[0] = weight_sum;
      to[block.filters] = bias_sum;
    }
    const float share = 1.0f / static_cast<float>(positions), factor = tables.factor[filter];
    tables.slope[filter] = -factor * (weight_sum * share) * rstd;
    tables.term[filter] = -factor * (bias_sum * share);
  }
  if (!gradients.x_gradient && !gradients.conv_gradient) return;

  // Then the gradients, a warp's of its tiles, two at a time.
  Cell* const of_z = static_cast<Cell*>(gradients.conv_gradient);
  DMFAST_ROLLED
  for (int first = 0; first < block.tiles(); first += strip_tiles) {
    const int tiles = block.tiles() - first < strip_tiles ? block.tiles() - first : strip_tiles;
    __syncthreads();  // the tables are there, the strip and its gradient have been read
    if (block.tiles() > strip_tiles) {
      make_strip<kSteps>(strip, image, block, first, tiles);
      __syncthreads();
    }
    DMFAST_ROLLED
    for (int pair = 2 * warp; pair < tiles; pair += 2 * block.chunks()) {
      float sums[2][2 * kSteps][4] = {};
      DMFAST_ROLLED
      for (int chunk = 0; chunk < block.chunks(); ++chunk) {
        const int filter = chunk * kThinFilters + lane % 4 * kFilters;
        ThinWeights<kSteps> weights;
        DMFAST_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          load_weights<kThinFilters>(weights.pair[step], weights_here + chunk * chunk_cells, step);
        }
        float mean[kFilters], factor[kFilters], bias[kFilters], slope[kFilters], term[kFilters];
        load_floats(mean, tables.mean + filter);
        load_floats(factor, tables.factor + filter);
        load_floats(bias, tables.bias + filter);
        load_floats(slope, tables.slope + filter);
        load_floats(term, tables.term + filter);
        Words rows[2][2];  // of a tile: the upper rows and the lower
        DMFAST_UNROLL
        for (int m = 0; m < 2; ++m) {
          const bool is_there = pair + m < tiles;
          const int tile = is_there ? pair + m : pair;
          const Words of_pooled = pooled_gradient(first + tile, filter);
          float z[kTiles][4];
          convolve_tile(z, strip, tile, weights);
          DMFAST_UNROLL
          for (int i = 0; i < kFilters; ++i) {
            DMFAST_UNROLL
            for (int e = i % 2; e < 4; e += 2) {
              const float beside = z[i / 2][e] - mean[i];
              const float passed =
                  relu_gradient(beside * factor[i] + bias[i], element(of_pooled, i));
              z[i / 2][e] = factor[i] * passed + (slope[i] * beside + term[i]);
            }
          }
          const TilePlace place(block, first + tile);
          DMFAST_UNROLL
          for (int lower = 0; lower < 2; ++lower) {
            DMFAST_UNROLL
            for (int j = 0; j < kTiles; ++j) {
              rows[m][lower].element[j] = bfloat16_pair(z[j][2 * lower], z[j][2 * lower + 1]);
            }
            if (of_z && is_there) {
              const int64_t position =
                  number * positions + (place.y + lower) * block.conv_width + place.x + lane / 4;
              *reinterpret_cast<Words*>(of_z + (position * block.filters + filter) / 8) =
                  rows[m][lower];
            }
          }
        }
        if (!gradients.x_gradient) continue;
        DMFAST_UNROLL
        for (int step = 0; step < kThinFilters / 16; ++step) {
          uint32_t of_turned[2 * kSteps][2];
          load_weights<kDepth>(of_turned, turned_here + chunk * chunk_cells, step);
          DMFAST_UNROLL
          for (int m = 0; m < 2; ++m) {
            // What a product leaves is laid out as the next one takes it.
            const uint32_t of_rows[4] = {rows[m][0].element[2 * step], rows[m][1].element[2 * step],
                                         rows[m][0].element[2 * step + 1],
                                         rows[m][1].element[2 * step + 1]};
            DMFAST_UNROLL
            for (int j = 0; j < 2 * kSteps; ++j) {
              multiply_add(sums[m][j], of_rows, of_turned[j][0], of_turned[j][1]);
            }
          }
        }
      }
      DMFAST_UNROLL
      for (int m = 0; m < 2; ++m) {
        if (pair + m >= tiles) break;
        DMFAST_UNROLL
        for (int j = 0; j < 2 * kSteps; ++j) {
          DMFAST_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int position = (pair + m) * 16 + lane / 4 + e / 2 * 8;
            columns[position * parts.pitch + j * 8 + lane % 4 * 2 + e % 2] = sums[m][j][e];
          }
        }
      }
    }
    if (!gradients.x_gradient) continue;
    __syncthreads();  // the columns are there
    const int lines = tiles / block.tile_columns() * 2;
    const int top = first / block.tile_columns() * 2;
    add_columns(gradient, columns, parts.pitch, block, top, top + lines);
  }
  if (!gradients.x_gradient) return;
  __syncthreads();
  BFloat16* const of_x = static_cast<BFloat16*>(gradients.x_gradient) + number * image_size;
  for (int i = thread; i < image_size; i += static_cast<int>(blockDim.x)) {
    of_x[i] = BFloat16(gradient[i]);
  }
}

// ---- Launches ----------------------------------------------------------------------------------

template <typename Body>
int with_steps(const FusedBlock& block, const Body& body) {
  switch (thin_block_depth(block)) {
    case 16: return body(std::integral_constant<int, 1>{});
    case 32: return body(std::integral_constant<int, 2>{});
    case 48: return body(std::integral_constant<int, 3>{});
    default: return 1;  // cudaErrorInvalidValue
  }
}

Thin thin(const FusedBlock& block) {
  return {static_cast<int>(block.images_of_network()),
          static_cast<int>(block.channels),
          static_cast<int>(block.height),
          static_cast<int>(block.width),
          static_cast<int>(block.padding),
          static_cast<int>(block.filters),
          static_cast<int>(block.conv_height()),
          static_cast<int>(block.conv_width()),
          block.eps};
}

}  // namespace

int thin_block_shared_bytes(const FusedBlock& block, bool backward) {
  const int depth = thin_block_depth(block);
  return backward ? ThinBackwardShared(thin(block), depth).bytes()
                  : ThinShared(thin(block), depth).forward();
}

int thin_block_forward(const FusedBlock& block, const void* x, const void* packed,
                       const FusedNorm& norm, void* out, float* statistics, void* stream) {
  return with_steps(block, [&](auto steps) {
    constexpr auto kKernel = thin_forward_kernel<decltype(steps)::value>;
    if (const int error = allow_shared_bytes<kKernel>()) return error;
    const Thin thin_block = thin(block);
    const BFloat16* const from = static_cast<const BFloat16*>(x);
    const Cell* const weights = static_cast<const Cell*>(packed);
    BFloat16* const to = static_cast<BFloat16*>(out);
    const FusedNorm parameters = norm;
    return DMFAST_LAUNCH_SHARED(kKernel, static_cast<unsigned>(block.images),
                                static_cast<unsigned>(block.filters),
                                thin_block_shared_bytes(block, false), stream, thin_block, from,
                                weights, parameters, to, statistics);
  });
}

int thin_block_backward(const FusedBlock& block, const void* x, const void* packed,
                        const void* turned, const FusedNorm& norm, const FusedGradients& gradients,
                        void* stream) {
  return with_steps(block, [&](auto steps) {
    constexpr auto kKernel = thin_backward_kernel<decltype(steps)::value>;
    if (const int error = allow_shared_bytes<kKernel>()) return error;
    const Thin thin_block = thin(block);
    const BFloat16* const from = static_cast<const BFloat16*>(x);
    const Cell* const weights = static_cast<const Cell*>(packed);
    const Cell* const turned_weights = static_cast<const Cell*>(turned);
    const FusedNorm parameters = norm;
    const FusedGradients of_kernel = gradients;
    return DMFAST_LAUNCH_SHARED(kKernel, static_cast<unsigned>(block.images),
                                static_cast<unsigned>(block.filters),
                                thin_block_shared_bytes(block, true), stream, thin_block, from,
                                weights, turned_weights, parameters, of_kernel);
  });
}

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// A block's tile of a wide convolution: 256 positions, which are whole images, by 64 filters for
// every four warps.
//
// There is no im2col. The images lie whole in shared memory with a border of zeros, in cells of 8
// channels, [channels / 8][y][x]: the rows of a matrix that a tap multiplies are then neighbouring
// cells, shifted with the tap, and 8 of them are 128 bytes in one piece, or two pieces that share
// no bank. The weights come through a ring of stages, [4 cells of the depth][64 filters] for every
// four warps, as they lie in memory.
#pragma once

#include "block_tile_cuda.h"
#include "conv_block_cuda.h"

namespace dmfast {

constexpr int kWideTile = 256;    // positions
constexpr int kWideColumns = 64;  // of a warp
constexpr int kWideTiles = kWideColumns / 8;
constexpr int kStages = 4;
constexpr int kStagePlanes = 4;  // 32 channels
constexpr int kChunkStage = kStagePlanes * kWideColumns;

// Images of kSide x kSide in cells, and the positions of a warp's four tiles of 16 rows.
template <int kSide>
struct WideTile {
  static_assert(kSide == 4 || kSide == 8 || kSide == 16, "whole images of 256 positions");
  static constexpr int kImages = kWideTile / (kSide * kSide);
  static constexpr int kPitch = kSide + 2;
  static constexpr int kImageCells = kPitch * kPitch;
  // Odd, so that the cells of a position in several planes share no bank.
  static constexpr int kPlane = kImages * kImageCells | 1;
  // A warp has an image's quarter, an image, or four.
  static constexpr int kWarpImages = kImages < 4 ? 1 : kImages / 4;
  static constexpr int kTilesOfImage = 4 / kWarpImages;  // of the warp
  static constexpr bool kImageOfBlock = kSide == 16;

  // In a plane, that of a position of the images, one after another.
  __device__ static int cell(int position) {
    const int image = position / (kSide * kSide), inside = position % (kSide * kSide);
    return image * kImageCells + (inside / kSide + 1) * kPitch + inside % kSide + 1;
  }
  // The one that tap (0, 0) takes of a row of the warp's first tile.
  __device__ static int first_cell(int warp, int row) {
    const int x = row % 8, lower = row / 8;
    if constexpr (kSide == 16) return (4 * warp + lower) * kPitch + x;
    if constexpr (kSide == 8) return warp * kImageCells + lower * kPitch + x;
    return 4 * warp * kImageCells + (x / 4 * 2 + lower) * kPitch + x % 4;
  }
  // What a later tile adds to that.
  __device__ static constexpr int tile_cell(int tile) {
    if (kSide == 16) return tile / 2 * 2 * kPitch + tile % 2 * 8;
    return kSide == 8 ? 2 * tile * kPitch : tile * kImageCells;
  }
  __device__ static constexpr int image_of(int warp, int tile) {
    return kSide == 16 ? 0 : kSide == 8 ? warp : 4 * warp + tile;
  }
  // Of an image: the place of a row of a tile.
  __device__ static int place(int warp, int tile, int row) {
    const int x = row % 8, lower = row / 8;
    if (kSide == 16) return (4 * warp + tile / 2 * 2 + lower) * kSide + tile % 2 * 8 + x;
    if (kSide == 8) return (2 * tile + lower) * kSide + x;
    return (x / 4 * 2 + lower) * kSide + x % 4;
  }
  // Of the pooled image: that of rows x and x + 8.
  __device__ static int pooled_place(int warp, int tile, int x) {
    constexpr int kWidth = kSide / 2;
    if (kSide == 16) return (2 * warp + tile / 2) * kWidth + tile % 2 * 4 + x / 2;
    if (kSide == 8) return tile * kWidth + x / 2;
    return x / 4 * kWidth + x % 4 / 2;
  }
};

// What the kernels know of a block.
struct Wide {
  int images_of_network, tiles_of_network;
  int log2_groups;  // cells of a position
  int filters, chunks;
  float eps;

  static int log2_of(int64_t power) {
    int log2 = 0;
    while (int64_t{1} << (log2 + 1) <= power) ++log2;
    return log2;
  }
  template <int kSide>
  static Wide of(const FusedBlock& block) {
    const int images = static_cast<int>(block.images_of_network());
    const int at_once = WideTile<kSide>::kImages;
    return {images,
            (images + at_once - 1) / at_once,
            log2_of(block.channels / 8),
            static_cast<int>(block.filters),
            static_cast<int>((block.filters + kWideColumns - 1) / kWideColumns),
            block.eps};
  }

  __device__ int groups() const { return 1 << log2_groups; }
  // Cells of a chunk's packed weights.
  __device__ int64_t chunk_cells() const { return int64_t{9} * groups() * kWideColumns; }
};

// The images of a tile, which are of one network.
struct TileImages {
  int network, count;
  int64_t first;

  template <int kSide>
  __device__ static TileImages of(const Wide& block, int tile) {
    const int network = tile / block.tiles_of_network;
    const int image = tile % block.tiles_of_network * WideTile<kSide>::kImages;
    const int left = block.images_of_network - image;
    return {network, left < WideTile<kSide>::kImages ? left : WideTile<kSide>::kImages,
            int64_t{network} * block.images_of_network + image};
  }
};

// Where a warp is: four of them share their filters and divide the positions.
struct WidePlace {
  int lane, warp, chunk;  // warp of the four, and the four's filters

  __device__ static WidePlace of_thread() {
    const int thread = static_cast<int>(threadIdx.x);
    return {thread % 32, thread / 32 % 4, thread / 128};
  }
  __device__ int x() const { return lane / 4; }            // row of a tile, and the one 8 below
  __device__ int filter() const { return lane % 4 * 16; }  // first of the lane's 16
};

// Asks for whole images, `count` of them; the border is made zero in `planes` planes.
template <int kSide>
__device__ __forceinline__ void fetch_images(Cell* cells, const BFloat16* from, int log2_groups,
                                             int count, int planes) {
  using Tile = WideTile<kSide>;
  constexpr int kBorder = 4 * (kSide + 1);
  const int groups = 1 << log2_groups;
  const Cell* const source = reinterpret_cast<const Cell*>(from);
  for (int i = static_cast<int>(threadIdx.x); i < count * kSide * kSide << log2_groups;
       i += static_cast<int>(blockDim.x)) {
    copy_async(cells + (i & (groups - 1)) * Tile::kPlane + Tile::cell(i >> log2_groups),
               source + i);
  }
  for (int i = static_cast<int>(threadIdx.x); i < planes * Tile::kImages * kBorder;
       i += static_cast<int>(blockDim.x)) {
    const int image = i / kBorder, side = i % kBorder / (kSide + 1), along = i % (kSide + 1);
    const int y = side == 0 ? 0 : side == 1 ? kSide + 1 : side == 2 ? along + 1 : along;
    const int x = side == 0 ? along : side == 1 ? along + 1 : side == 2 ? 0 : kSide + 1;
    const int plane = image / Tile::kImages;
    cells[plane * Tile::kPlane + image % Tile::kImages * Tile::kImageCells + y * Tile::kPitch + x] =
        Cell{};
  }
}

// Writes whole images from where they were fetched to.
template <int kSide>
__device__ __forceinline__ void write_images(Cell* to, const Cell* cells, int log2_groups,
                                             int count) {
  using Tile = WideTile<kSide>;
  const int groups = 1 << log2_groups;
  for (int i = static_cast<int>(threadIdx.x); i < count * kSide * kSide << log2_groups;
       i += static_cast<int>(blockDim.x)) {
    to[i] = cells[(i & (groups - 1)) * Tile::kPlane + Tile::cell(i >> log2_groups)];
  }
}

// Adds the convolution of the images in `cells` to sums; `weights` are those of the four warps'
// filters, null where there are none. What the block asked for before is there afterwards; the ring
// is free again after a barrier.
template <int kSide>
__device__ __forceinline__ void convolve(float (&sums)[4][kWideTiles][4], const Cell* cells,
                                         Cell* ring, int ring_chunks, const Cell* weights,
                                         int groups) {
  using Tile = WideTile<kSide>;
  const WidePlace at = WidePlace::of_thread();
  const int of_tap = groups / kStagePlanes, steps = 9 * of_tap;
  const int thread = static_cast<int>(threadIdx.x) % 128, stride = ring_chunks * kChunkStage;
  Cell* const mine = ring + at.chunk * kChunkStage;
  const auto fetch = [&](int step) {
    if (step < steps && weights) {
      Cell* const stage = mine + step % kStages * stride;
      const Cell* const from = weights + step * kChunkStage;
      copy_async(stage + thread, from + thread);
      copy_async(stage + thread + 128, from + thread + 128);
    }
    commit_copies();
  };
  DMFAST_UNROLL
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  const Cell* const rows =
      cells + Tile::first_cell(at.warp, at.lane % 16) + at.lane / 16 * Tile::kPlane;
  const int column = at.lane / 8 % 2 * kWideColumns + at.lane / 16 * 8 + at.lane % 8;
  int tap = 0, group = 0;
  DMFAST_ROLLED
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before
    fetch(step + kStages - 1);
    if (weights) {
      const Cell* const stage = mine + step % kStages * stride + column;
      const Cell* const shifted =
          rows + group * kStagePlanes * Tile::kPlane + tap / 3 * Tile::kPitch + tap % 3;
      DMFAST_UNROLL
      for (int half = 0; half < kStagePlanes; half += 2) {
        uint32_t of_weights[kWideTiles / 2][4];
        DMFAST_UNROLL
        for (int j = 0; j < kWideTiles / 2; ++j) {
          load_matrices(of_weights[j], stage + half * kWideColumns + j * 16);
        }
        DMFAST_UNROLL
        for (int m = 0; m < 4; ++m) {
          uint32_t of_images[4];
          load_matrices(of_images, shifted + half * Tile::kPlane + Tile::tile_cell(m));
          DMFAST_UNROLL
          for (int j = 0; j < kWideTiles; ++j) {
            const uint32_t* const pair = of_weights[j / 2] + j % 2 * 2;
            multiply_add(sums[m][j], of_images, pair[0], pair[1]);
          }
        }
      }
    }
    if (++group == of_tap) {
      group = 0;
      ++tap;
    }
  }
}

// Leaves a lane's sums of its 16 filters over the warp's rows for read_sums, after image_barrier.
// `scratch` is [4 warps][64] of the four warps, and not written before for another sum.
__device__ __forceinline__ void leave_sums(float (&sums)[16], float* scratch) {
  const WidePlace at = WidePlace::of_thread();
  sum_over_rows(sums);
  *reinterpret_cast<Pack<float, 2>*>(scratch + at.warp * kWideColumns + at.filter() +
                                     2 * at.x()) = {{sums[0], sums[1]}};
}

// Until all who hold rows of the warp's images are here.
template <int kSide>
__device__ __forceinline__ void image_barrier() {
  if constexpr (WideTile<kSide>::kImageOfBlock) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// What so many warps left of a lane's filters from its first + `from` on.
template <int kWarps, int kCount>
__device__ __forceinline__ void read_sums_of(float (&sums)[kCount], const float* scratch,
                                             int from) {
  scratch += WidePlace::of_thread().filter() + from;
  load_floats(sums, scratch);
  DMFAST_UNROLL
  for (int warp = 1; warp < kWarps; ++warp) {
    float more[kCount];
    load_floats(more, scratch + warp * kWideColumns);
    DMFAST_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] += more[i];
  }
}

// The sums over the warp's image.
template <int kSide, int kCount>
__device__ __forceinline__ void read_sums(float (&sums)[kCount], const float* scratch, int from) {
  if constexpr (WideTile<kSide>::kImageOfBlock) {
    read_sums_of<4>(sums, scratch, from);
  } else {
    read_sums_of<1>(sums, scratch + WidePlace::of_thread().warp * kWideColumns, from);
  }
}

}  // namespace dmfast

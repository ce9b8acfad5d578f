// SPDX-License-Identifier: MIT
// The forward of wide blocks for sm_90a: the tile of wide_tile_cuda.h by the products of
// warpgroups, which read both factors from shared memory. Compiled and emulated, never run on a GPU
// so far.
//
// 256 positions by 128 filters, two warpgroups of two pieces of 8 x 8 positions each: of a 16 x 16
// image one has the upper half, of four 8 x 8 images each has two. Warp w of four has lines 2w and
// 2w + 1 of a piece, so a lane holds what it pools, as in the other kernels. The cells of an image
// serve as they lie: 8 neighbours along x are a core matrix, the next line is the next 8 rows, the
// next plane the next 8 of the depth, and a tap moves the address where they begin.
#include <cmath>

#include "cuda_host.h"
#include "norm_pool.h"
#include "wgmma_cuda.h"
#include "wide_block_cuda.h"
#include "wide_tile_cuda.h"

namespace dmfast {
namespace {

constexpr int kColumns = 2 * kWideColumns;

#if defined(DMFAST_WGMMA)

constexpr int kPieces = 2;  // of a warpgroup
constexpr int kStageCells = kStagePlanes * kColumns;
constexpr int kAhead = 2;  // stages: products still read the one before

template <int kSide>
__device__ __forceinline__ int first_cell(int group, int piece) {
  using Tile = WideTile<kSide>;
  if constexpr (kSide == 16) return 8 * group * Tile::kPitch + 8 * piece;
  return (kPieces * group + piece) * Tile::kImageCells;
}

template <int kSide>
__device__ __forceinline__ void convolve_by_group(float (&sums)[kPieces][16][4], const Cell* cells,
                                                  Cell* ring, const Cell* weights,
                                                  int64_t chunk_cells, int groups) {
  using Tile = WideTile<kSide>;
  const int thread = static_cast<int>(threadIdx.x);
  const int of_tap = groups / kStagePlanes, steps = 9 * of_tap;
  const auto fetch = [&](int step) {
    if (step < steps) {
      Cell* const stage = ring + step % kStages * kStageCells;
      DMFAST_UNROLL
      for (int i = thread; i < kStageCells; i += 256) {
        const int plane = i / kColumns, column = i % kColumns;
        copy_async(stage + i, weights + column / kWideColumns * chunk_cells + step * kChunkStage +
                                  plane * kWideColumns + column % kWideColumns);
      }
    }
    commit_copies();
  };
  DMFAST_UNROLL
  for (int step = 0; step < kAhead; ++step) fetch(step);
  const Cell* const first[kPieces] = {cells + first_cell<kSide>(thread / 128, 0),
                                      cells + first_cell<kSide>(thread / 128, 1)};
  int tap = 0, group = 0;
  DMFAST_ROLLED
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kAhead - 1>();
    show_to_products();
    wait_for_products<1>();
    __syncthreads();  // the stage is there for all, and all are done with the one before the last
    fetch(step + kAhead);
    const Cell* const stage = ring + step % kStages * kStageCells;
    const int shift = group * kStagePlanes * Tile::kPlane + tap / 3 * Tile::kPitch + tap % 3;
    begin_products();
    DMFAST_UNROLL
    for (int half = 0; half < kStagePlanes; half += 2) {
      const SharedMatrix of_weights(stage + half * kColumns, kColumns, 8);
      DMFAST_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        const SharedMatrix of_images(first[piece] + shift + half * Tile::kPlane, Tile::kPlane,
                                     Tile::kPitch);
        multiply_add(sums[piece], of_images, of_weights);
      }
    }
    commit_products();
    if (++group == of_tap) {
      group = 0;
      ++tap;
    }
  }
  wait_for_products<0>();
}

#endif  // DMFAST_WGMMA

template <int kSide>
__global__ void __launch_bounds__(256, 1)
    wgmma_forward_kernel(const Wide block, const BFloat16* const x, const Cell* const packed,
                         const FusedNorm norm, BFloat16* const out, float* const statistics) {
#if defined(DMFAST_WGMMA)
  using Tile = WideTile<kSide>;
  constexpr bool kWhole = Tile::kImageOfBlock;   // both warpgroups have the same image
  constexpr int kImages = kWhole ? 1 : kPieces;  // of a warpgroup
  constexpr float kShare = 1.0f / (kSide * kSide);
  DMFAST_SHARED_BYTES(shared);
  Cell* const cells = reinterpret_cast<Cell*>(shared);
  Cell* const ring = cells + block.groups() * Tile::kPlane;
  const WidePlace at = WidePlace::of_thread();
  const int warpgroup = at.chunk, pairs = block.chunks / 2;
  const int first_chunk = static_cast<int>(blockIdx.x) % pairs * 2;
  const TileImages images = TileImages::of<kSide>(block, static_cast<int>(blockIdx.x) / pairs);

  const int64_t image_size = int64_t{kSide * kSide * 8} << block.log2_groups;
  fetch_images<kSide>(cells, x + images.first * image_size, block.log2_groups, images.count,
                      block.groups());
  const Cell* const weights =
      packed + (int64_t{images.network} * block.chunks + first_chunk) * block.chunk_cells();
  float sums[kPieces][16][4] = {};
  convolve_by_group<kSide>(sums, cells, ring, weights, block.chunk_cells(), block.groups());
  __syncthreads();  // the ring has been read

  // [8 warps][64] for a sum.
  float* scratch = reinterpret_cast<float*>(ring);
  const auto sum_over_image = [&](float (&values)[16]) {
    float* const of_group = scratch + warpgroup * 4 * kWideColumns;
    leave_sums(values, of_group);
    __syncthreads();
    if constexpr (kWhole) {
      read_sums_of<8>(values, scratch, 0);
    } else {
      read_sums_of<4>(values, of_group, 0);
    }
    scratch += 8 * kWideColumns;
  };
  const FusedNorm of_network = norm.of_network(images.network);
  const bool right = at.x() % 2 != 0;
  DMFAST_UNROLL
  for (int chunk = 0; chunk < 2; ++chunk) {
    const int filter = (first_chunk + chunk) * kWideColumns + at.filter();
    DMFAST_UNROLL
    for (int part = 0; part < kImages; ++part) {
      const int first = part, last = part + kPieces / kImages;
      const int image = kWhole ? 0 : kPieces * warpgroup + part;
      float mean[16] = {}, factor[16] = {};
      DMFAST_UNROLL
      for (int i = 0; i < 16; ++i) {
        DMFAST_UNROLL
        for (int piece = first; piece < last; ++piece) {
          const float (&value)[4] = sums[piece][8 * chunk + i / 2];
          mean[i] += value[i % 2] + value[i % 2 + 2];
        }
      }
      sum_over_image(mean);
      DMFAST_UNROLL
      for (int i = 0; i < 16; ++i) {
        mean[i] *= kShare;
        DMFAST_UNROLL
        for (int piece = first; piece < last; ++piece) {
          DMFAST_UNROLL
          for (int e = i % 2; e < 4; e += 2) {
            float& value = sums[piece][8 * chunk + i / 2][e];
            value -= mean[i];
            factor[i] += value * value;
          }
        }
      }
      sum_over_image(factor);
      DMFAST_UNROLL
      for (int i = 0; i < 16; ++i) factor[i] = 1.0f / sqrtf(factor[i] * kShare + block.eps);
      const bool writes = at.x() == 0 && at.warp == 0 && (!kWhole || warpgroup == 0);
      if (statistics && writes && image < images.count) {
        float* const to = statistics + (images.first + image) * 2 * block.filters + filter;
        store_floats(to, mean);
        store_floats(to + block.filters, factor);
      }
      float weight[16], bias[16];
      load_parameter(weight, of_network.weight, filter, 1.0f);
      load_parameter(bias, of_network.bias, filter, 0.0f);
      DMFAST_UNROLL
      for (int i = 0; i < 16; ++i) {
        factor[i] *= weight[i];
        DMFAST_UNROLL
        for (int piece = first; piece < last; ++piece) {
          float (&value)[4] = sums[piece][8 * chunk + i / 2];
          value[i % 2] = relu(value[i % 2] * factor[i] + bias[i]) +
                         relu(value[i % 2 + 2] * factor[i] + bias[i]);
        }
      }
    }
    // Of two neighbours along x the left one goes on with the first piece, the other with the
    // second.
    float pooled[16];
    DMFAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      const float early = sums[0][8 * chunk + i / 2][i % 2];
      const float late = sums[1][8 * chunk + i / 2][i % 2];
      const float other = __shfl_xor_sync(kAllLanes, right ? early : late, 4);
      pooled[i] = 0.25f * ((right ? late : early) + other);
    }
    const int piece = right ? 1 : 0, image = kWhole ? 0 : kPieces * warpgroup + piece;
    const int y = kWhole ? 4 * warpgroup + at.warp : at.warp;
    const int place = y * (kSide / 2) + (kWhole ? 4 * piece : 0) + at.x() / 2;
    if (image < images.count) {
      const int64_t position = (images.first + image) * (kSide * kSide / 4) + place;
      store_cells(reinterpret_cast<Cell*>(out + position * block.filters + filter), 1, pooled);
    }
  }
#endif
}

// Calls body with the kernel for the block's images.
template <typename Body>
int with_kernel(const FusedBlock& block, const Body& body) {
  if (block.height == 16) return body(std::integral_constant<int, 16>{});
  return body(std::integral_constant<int, 8>{});
}

// Whether it was compiled for a GPU that has such products: others find an empty kernel, which
// takes few registers.
template <int kSide>
bool is_compiled() {
#if defined(__CUDACC__)
  cudaFuncAttributes found{};
  const auto kernel = wgmma_forward_kernel<kSide>;
  return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.numRegs > 128;
#else
  return true;
#endif
}

}  // namespace

bool wide_block_wgmma(const FusedBlock& block) {
  return block.filters % kColumns == 0 && block.height >= 8 &&
         wide_block_shared_bytes(block, kColumns, false) <= block_shared_bytes() &&
         with_kernel(block, [](auto side) { return is_compiled<decltype(side)::value>(); });
}

int wide_block_forward_wgmma(const FusedBlock& block, const void* x, const void* packed,
                             const FusedNorm& norm, void* out, float* statistics, void* stream) {
  return with_kernel(block, [&](auto side) {
    constexpr int kSide = decltype(side)::value;
    constexpr auto kKernel = wgmma_forward_kernel<kSide>;
    if (const int error = allow_shared_bytes<kKernel>()) return error;
    const Wide wide_block = Wide::of<kSide>(block);
    const int64_t blocks = block.networks * wide_block.tiles_of_network * (wide_block.chunks / 2);
    const BFloat16* const from = static_cast<const BFloat16*>(x);
    const Cell* const weights = static_cast<const Cell*>(packed);
    BFloat16* const to = static_cast<BFloat16*>(out);
    const FusedNorm parameters = norm;
    return DMFAST_LAUNCH_SHARED(kKernel, static_cast<unsigned>(blocks), 256,
                                wide_block_shared_bytes(block, kColumns, false), stream, wide_block,
                                from, weights, parameters, to, statistics);
  });
}

}  // namespace dmfast

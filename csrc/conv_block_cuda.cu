// SPDX-License-Identifier: MIT
// What speed to expect of the kernels: predictions from counts, nothing of it measured. Cycles are
// of a multiprocessor, which does 1,024 products and sums (A100) or 2,048 (H100) of bfloat16 in one
// at best.
//
// Wide, 128 channels and filters, a 16 x 16 image forward: 37.7 million products, 18,432 mma.sync
// of 2,048. A warp's 64 x 64 takes 8 ldmatrix.x4 for 32 of them, so shared memory is read for
// 18,432 cycles (512 bytes in 4) and written for 3,400; 422 KB come from L2, 64 KB of images twice
// and 295 KB of weights; statistics, norm and pooling are some 10 instructions a value, 2,600
// cycles.
//   A100   36,900 cycles of products; shared memory is busy for 60 % of them. One block of 8 warps:
//          its beginning and end, some 5,000 cycles, overlap with nothing: 80 to 85 % of the rate.
//   H100   mma.sync is known to reach some 60 % of the tensor cores' rate: 30,000 cycles, of which
//          shared memory is busy for 70 %; L2 gives 14 bytes a cycle. Two blocks, one of which
//          computes while the other begins or ends: 50 to 55 % of the rate.
//   wgmma  m64n128k16 reads 6 KB for its 64 cycles, 48 of them: 18,400 cycles, then some 5,000 that
//          overlap with nothing: 70 to 75 % of the rate.
// Backward to the input does the same twice in one block a multiprocessor, with two more passes
// over the registers: 10 % less of the rate.
//
// Thin, 3 channels, 128 filters, a 32 x 32 image: 8.4 million products as they are padded and made
// twice, 6,600 cycles on an H100; but some 10 instructions for each of 131,072 values are 10,000
// cycles, and these bound it.
#include "block_tile_cuda.h"
#include "conv_block_cuda.h"
#include "cuda_host.h"
#include "thin_block_cuda.h"
#include "wide_block_cuda.h"

namespace dmfast {
namespace {

constexpr int kPackThreads = 256;

bool is_thin(const FusedBlock& block) { return block.channels <= kThinBlockChannels; }

bool is_power(int64_t value, int64_t least, int64_t most) {
  return value >= least && value <= most && (value & (value - 1)) == 0;
}

// Packed weights are chunks of filters, each of planes of cells: [chunk][plane][column][8], where a
// column is a filter and the 8 follow one another along the depth.
struct Packing {
  int networks, filters, channels;  // of the weights in memory
  int chunks, planes, columns;
  bool turned;

  int64_t cells() const { return int64_t{networks} * chunks * planes * columns; }
};

// Wide: the depth is [tap][channel]. Turned, filters are the channels of the convolution's input.
struct WidePacking : Packing {
  __device__ float value(const float* weights, int chunk, int plane, int column, int i) const {
    const int outer = chunk * columns + filter_of_column(column, columns / 8);
    const int groups = planes / 9, tap = plane / groups, inner = plane % groups * 8 + i;
    if (outer >= (turned ? channels : filters)) return 0.0f;
    const int filter = turned ? inner : outer, channel = turned ? outer : inner;
    return weights[(int64_t{filter} * channels + channel) * 9 + (turned ? 8 - tap : tap)];
  }
};

// Thin: the depth is [tap][channel] too, filled up to a multiple of 16. Turned, it is the chunk's
// filters, and columns are what was the depth.
struct ThinPacking : Packing {
  __device__ float value(const float* weights, int chunk, int plane, int column, int i) const {
    const int of_chunk = turned ? plane * 8 + i : column, depth = turned ? column : plane * 8 + i;
    if (depth >= 9 * channels) return 0.0f;
    const int filter = chunk * kThinFilters + filter_of_column(of_chunk, kThinFilters / 8);
    return weights[(int64_t{filter} * channels + depth % channels) * 9 + depth / channels];
  }
};

template <typename T>
__global__ void __launch_bounds__(kPackThreads, 1)
    pack_kernel(const T packing, const float* const weights, Cell* const packed) {
  const int64_t cells =
      int64_t{packing.networks} * packing.chunks * packing.planes * packing.columns;
  for (int64_t cell = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; cell < cells;
       cell += int64_t{gridDim.x} * kPackThreads) {
    const int64_t plane = cell / packing.columns, chunk = plane / packing.planes;
    const float* const of_network =
        weights + chunk / packing.chunks * packing.filters * packing.channels * 9;
    Cell result;
    DMFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      result.element[i] = BFloat16(packing.value(
          of_network, static_cast<int>(chunk % packing.chunks),
          static_cast<int>(plane % packing.planes), static_cast<int>(cell % packing.columns), i));
    }
    packed[cell] = result;
  }
}

WidePacking wide_packing(const FusedBlock& block, bool turned) {
  const int64_t outer = turned ? block.channels : block.filters;
  const int64_t inner = turned ? block.filters : block.channels;
  return {{static_cast<int>(block.networks), static_cast<int>(block.filters),
           static_cast<int>(block.channels),
           static_cast<int>((outer + kWideFilters - 1) / kWideFilters),
           static_cast<int>(9 * inner / 8), kWideFilters, turned}};
}

ThinPacking thin_packing(const FusedBlock& block, bool turned) {
  const int depth = thin_block_depth(block);
  return {{static_cast<int>(block.networks), static_cast<int>(block.filters),
           static_cast<int>(block.channels), static_cast<int>(block.filters / kThinFilters),
           turned ? kThinFilters / 8 : depth / 8, turned ? depth : kThinFilters, turned}};
}

template <typename T>
int pack(const T& packing, const float* weights, void* packed, void* stream) {
  const int64_t blocks = (packing.cells() + kPackThreads - 1) / kPackThreads;
  if (blocks == 0) return 0;
  const auto kernel = pack_kernel<T>;
  const T of_kernel = packing;
  Cell* const to = static_cast<Cell*>(packed);
  return DMFAST_LAUNCH(kernel, static_cast<unsigned>(blocks < 65535 ? blocks : 65535), kPackThreads,
                       stream, of_kernel, weights, to);
}

bool thin_block_taken(const FusedBlock& block, bool backward) {
  const int64_t sides[] = {block.height, block.width, block.conv_height(), block.conv_width()};
  for (const int64_t side : sides) {
    if (side < 1 || side > 128) return false;
  }
  return block.channels >= 1 && is_thin(block) && block.padding >= 0 && block.padding <= 8 &&
         block.conv_width() % 8 == 0 && block.conv_height() % 2 == 0 && block.filters >= 32 &&
         block.filters <= 256 && block.filters % 32 == 0 &&
         thin_block_shared_bytes(block, backward) <= block_shared_bytes();
}

bool wide_block_taken(const FusedBlock& block, bool backward) {
  return is_power(block.channels, 32, 256) && is_power(block.filters, 32, backward ? 128 : 256) &&
         is_power(block.height, backward ? 8 : 4, 16) && block.width == block.height &&
         block.padding == 1 &&
         wide_block_shared_bytes(block, backward ? 128 : 64, backward) <= block_shared_bytes();
}

// The kernels count in 32 bits within a network, and blocks of all.
constexpr int64_t kMost = int64_t{1} << 28;

}  // namespace

bool conv_block_fused(const FusedBlock& block, bool backward) {
  if (block.images > kMost || block.networks < 1 || block.networks > kMost) return false;
  if (!has_tensor_cores()) return false;
  return is_thin(block) ? thin_block_taken(block, backward) : wide_block_taken(block, backward);
}

bool conv_block_wgmma(const FusedBlock& block) {
  return !is_thin(block) && conv_block_fused(block, false) && wide_block_wgmma(block);
}

int64_t conv_block_packed_bytes(const FusedBlock& block, bool turned) {
  const int64_t cells =
      is_thin(block) ? thin_packing(block, turned).cells() : wide_packing(block, turned).cells();
  return cells * static_cast<int64_t>(sizeof(Cell));
}

int conv_block_pack_launch(const FusedBlock& block, const float* weights, bool turned, void* packed,
                           void* stream) {
  return is_thin(block) ? pack(thin_packing(block, turned), weights, packed, stream)
                        : pack(wide_packing(block, turned), weights, packed, stream);
}

int conv_block_forward_launch(const FusedBlock& block, const void* x, const void* packed,
                              const FusedNorm& norm, void* out, float* statistics, bool wgmma,
                              void* stream) {
  if (block.images == 0) return 0;
  if (!conv_block_fused(block, false)) return 1;  // cudaErrorInvalidValue
  if (wgmma && !conv_block_wgmma(block)) return 1;
  const auto forward = is_thin(block) ? thin_block_forward
                       : wgmma        ? wide_block_forward_wgmma
                                      : wide_block_forward;
  return forward(block, x, packed, norm, out, statistics, stream);
}

int conv_block_backward_launch(const FusedBlock& block, const void* x, const void* packed,
                               const void* turned, const FusedNorm& norm,
                               const FusedGradients& gradients, void* stream) {
  if (block.images == 0) return 0;
  if (!conv_block_fused(block, true)) return 1;  // cudaErrorInvalidValue
  const auto backward = is_thin(block) ? thin_block_backward : wide_block_backward;
  return backward(block, x, packed, turned, norm, gradients, stream);
}

}  // namespace dmfast

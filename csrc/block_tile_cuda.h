// SPDX-License-Identifier: MIT
// What the fused blocks' kernels share: how a warp holds a piece of the convolution, and sums over
// it.
//
// A warp's rows are positions, its columns filters, in tiles of 16 x 8 as multiply_add leaves them.
// The 16 rows of a tile are 8 neighbours along x in two lines, one below the other: a lane holds
// both positions of a column of the 2x2 that are pooled, its neighbour (lane ^ 4) the other two.
// With t = lane % 4, column 8j + 2t + e of kTiles tiles is filter 2 kTiles t + 2j + e: a lane's
// filters are neighbours, and it reads and writes them by the 16 bytes. The packing of the weights
// makes it so.
#pragma once

#include "mma_cuda.h"

namespace dmfast {

constexpr unsigned kAllLanes = 0xFFFFFFFF;

// The filter of a column, of tiles * 8.
DMFAST_HD int filter_of_column(int column, int tiles) {
  const int tile = column / 8, lane = column % 8 / 2;
  return 2 * tiles * lane + 2 * tile + column % 2;
}

// Sums over the lanes that hold the same filters. Each is left with kCount / 8 of them, in front:
// lane 4g + t those from filter kCount t + kCount / 8 g on.
template <int kCount>
__device__ __forceinline__ void sum_over_rows(float (&values)[kCount]) {
  DMFAST_UNROLL
  for (int step = 0; step < 3; ++step) {
    const int bit = 16 >> step, half = kCount >> (step + 1);
    const bool upper = (threadIdx.x & bit) != 0;
    DMFAST_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= half) break;
      const float kept = upper ? values[i + half] : values[i];
      const float given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, bit);
    }
  }
}

// Neighbours in memory, from a multiple of 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_floats(float (&to)[kCount], const float* from) {
  static_assert(kCount % 4 == 0, "by the 16 bytes");
  DMFAST_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    const Pack<float, 4> pack = *reinterpret_cast<const Pack<float, 4>*>(from + i);
    DMFAST_UNROLL
    for (int e = 0; e < 4; ++e) to[i + e] = pack.element[e];
  }
}

template <int kCount>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[kCount]) {
  DMFAST_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    Pack<float, 4> pack;
    DMFAST_UNROLL
    for (int e = 0; e < 4; ++e) pack.element[e] = from[i + e];
    *reinterpret_cast<Pack<float, 4>*>(to + i) = pack;
  }
}

// The same of a parameter of the norm, from a filter on; a null pointer makes it a constant.
template <int kCount>
__device__ __forceinline__ void load_parameter(float (&to)[kCount], const float* from, int filter,
                                               float otherwise) {
  if (from) {
    load_floats(to, from + filter);
    return;
  }
  DMFAST_UNROLL
  for (int i = 0; i < kCount; ++i) to[i] = otherwise;
}

using Words = Pack<uint32_t, 4>;  // eight bfloat16

// Neighbours to cells that are so many apart.
template <int kCount>
__device__ __forceinline__ void store_cells(Cell* to, int distance, const float (&from)[kCount]) {
  static_assert(kCount % 8 == 0, "by the cell");
  DMFAST_UNROLL
  for (int i = 0; i < kCount; i += 8) {
    Words words;
    DMFAST_UNROLL
    for (int e = 0; e < 4; ++e) {
      words.element[e] = bfloat16_pair(from[i + 2 * e], from[i + 2 * e + 1]);
    }
    *reinterpret_cast<Words*>(to + i / 8 * distance) = words;
  }
}

}  // namespace dmfast

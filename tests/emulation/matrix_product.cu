// SPDX-License-Identifier: MIT
// A small product of matrices by what mma_cuda.h offers: c [32, 16] = a [32, depth] b [16,
// depth]^T, depth a multiple of 16. One block of two warps; a ring of three stages of 16 of the
// depth.
#include "matrix_product.h"
#include "mma_cuda.h"

namespace dmfast {
namespace {

constexpr int kRows = 32, kColumns = 16, kStages = 3;
constexpr int kStageCells = 2 * (kRows + kColumns);

__global__ void __launch_bounds__(64, 1)
    product_kernel(const BFloat16* const a, const BFloat16* const b, const int depth,
                   float* const c) {
  DMFAST_SHARED_BYTES(shared);
  Cell* const ring = reinterpret_cast<Cell*>(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int steps = depth / 16;
  const auto fetch = [&](int step) {
    Cell* const stage = ring + step % kStages * kStageCells;
    for (int cell = thread; cell < kStageCells; cell += 64) {
      const int half = cell / (kRows + kColumns), row = cell % (kRows + kColumns);
      const BFloat16* const from = row < kRows ? a + row * depth : b + (row - kRows) * depth;
      copy_async(stage + cell, reinterpret_cast<const Cell*>(from + step * 16 + half * 8));
    }
  };
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    commit_copies();
  }
  float sums[2][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    commit_copies();
    const Cell* const stage = ring + step % kStages * kStageCells;
    uint32_t of_a[4], of_b[4];
    const int half = lane / 16, row = warp * 16 + lane % 16;
    load_matrices(of_a, stage + half * (kRows + kColumns) + row);
    const int half_of_b = lane / 8 % 2, column = kRows + lane / 16 * 8 + lane % 8;
    load_matrices(of_b, stage + half_of_b * (kRows + kColumns) + column);
    multiply_add(sums[0], of_a, of_b[0], of_b[1]);
    multiply_add(sums[1], of_a, of_b[2], of_b[3]);
  }
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + 8 * (i / 2), column = 8 * j + lane % 4 * 2 + i % 2;
      c[row * kColumns + column] = sums[j][i];
    }
  }
}

}  // namespace

int matrix_product_launch(const void* a, const void* b, int depth, float* c) {
  const BFloat16* const left = static_cast<const BFloat16*>(a);
  const BFloat16* const right = static_cast<const BFloat16*>(b);
  const int bytes = kStages * kStageCells * static_cast<int>(sizeof(Cell));
  return DMFAST_LAUNCH_SHARED(product_kernel, 1, 64, bytes, nullptr, left, right, depth, c);
}

}  // namespace dmfast

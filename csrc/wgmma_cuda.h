// SPDX-License-Identifier: MIT
// The products of a warpgroup (four warps) from matrices in shared memory, as sm_90a has them;
// under a host compiler the same as this source understands them, so that what the emulation shows
// of a kernel is its own indices, not the meaning of the instruction. Never run on a GPU so far.
#pragma once

#include "mma_cuda.h"

namespace dmfast {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DMFAST_WGMMA 1
#endif

// A matrix of cells, 8 rows of which are neighbours in memory: where it begins, and how many cells
// further the next 8 of its depth lie, and its next 8 rows. No swizzle.
struct SharedMatrix {
#if defined(__CUDACC__)
  uint64_t bits;

  __device__ __forceinline__ SharedMatrix(const Cell* first, int next_depth, int next_rows)
      : bits((shared_address(first) & 0x3FFFF) >> 4 | uint64_t(next_depth) << 16 |
             uint64_t(next_rows) << 32) {}
#else
  const Cell* first;
  int next_depth, next_rows;

  SharedMatrix(const Cell* cell, int depth, int rows)
      : first(cell), next_depth(depth), next_rows(rows) {}
#endif
};

#if defined(DMFAST_WGMMA)

// What the thread wrote or copied to shared memory becomes visible to the products, after a barrier
// to those of others.
__device__ __forceinline__ void show_to_products() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first products, and where registers that they add to were written.
__device__ __forceinline__ void begin_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
__device__ __forceinline__ void commit_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulation::commit_products();
#endif
}

// Waits for all groups but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#else
  emulation::wait_for_products(kLeft);
#endif
}

#define DMFAST_FOUR(s, j) "+f"(s[j][0]), "+f"(s[j][1]), "+f"(s[j][2]), "+f"(s[j][3])

// sums [64 x 128] += a [64 x 16] b [128 x 16]^T, some time until the group is waited for. Warp w of
// the four has rows 16w to 16w + 15, each tile of 8 columns as multiply_add has it.
__device__ __forceinline__ void multiply_add(float (&sums)[16][4], const SharedMatrix& a,
                                             const SharedMatrix& b) {
#if defined(__CUDACC__)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, 1, 1, 1, 0, 0;"
      : DMFAST_FOUR(sums, 0), DMFAST_FOUR(sums, 1), DMFAST_FOUR(sums, 2), DMFAST_FOUR(sums, 3),
        DMFAST_FOUR(sums, 4), DMFAST_FOUR(sums, 5), DMFAST_FOUR(sums, 6), DMFAST_FOUR(sums, 7),
        DMFAST_FOUR(sums, 8), DMFAST_FOUR(sums, 9), DMFAST_FOUR(sums, 10), DMFAST_FOUR(sums, 11),
        DMFAST_FOUR(sums, 12), DMFAST_FOUR(sums, 13), DMFAST_FOUR(sums, 14), DMFAST_FOUR(sums, 15)
      : "l"(a.bits), "l"(b.bits));
#else
  emulation::multiply_add(sums, {a.first, a.next_depth, a.next_rows},
                          {b.first, b.next_depth, b.next_rows});
#endif
}

#undef DMFAST_FOUR

#endif  // DMFAST_WGMMA

}  // namespace dmfast

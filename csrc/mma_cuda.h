// SPDX-License-Identifier: MIT
// The tensor cores' product of small matrices and what feeds it, as the warp's lanes hold them;
// under a host compiler the same from the definition. All lanes of a warp take part.
#pragma once

#include "cuda_types.h"

#if !defined(__CUDACC__)
#include "mma_emulation.h"
#endif

// Architectures before 8.0 have none of it: there the kernels are compiled, and are not launched.
#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define DMFAST_MMA(...) asm volatile(__VA_ARGS__)
#elif defined(__CUDACC__)
#define DMFAST_MMA(...)
#endif

namespace dmfast {

// Eight neighbours along the axis that is summed over: a row of a matrix of 8 x 8.
using Cell = Pack<BFloat16, 8>;

#if defined(__CUDACC__)
__device__ __forceinline__ unsigned shared_address(const void* address) {
  return static_cast<unsigned>(__cvta_generic_to_shared(address));
}
#endif

// Two values as bfloat16, the first in the low half.
__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  return uint32_t{BFloat16(low).bits} | uint32_t{BFloat16(high).bits} << 16;
}

__device__ __forceinline__ float of_high_bits(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  return bits_float(bits);
#endif
}

__device__ __forceinline__ float low_of_pair(uint32_t pair) { return of_high_bits(pair << 16); }

__device__ __forceinline__ float high_of_pair(uint32_t pair) {
  return of_high_bits(pair & 0xFFFF0000);
}

// c [16 x 8] += a [16 x 16] b [16 x 8]. With g = lane / 4 and t = lane % 4 a lane holds
//   c[i]  row g + 8 (i / 2), column 2t + i % 2
//   a[i]  row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next
//   b[i]  rows 2t + 8i and the next, column g
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if defined(__CUDACC__)
  DMFAST_MMA(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]),
      "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0),
      "r"(b1));
#else
  emulation::multiply_add(c, a, b0, b1);
#endif
}

// Four matrices of 8 x 8 from shared memory: lane l gives the address of row l % 8 of matrix l / 8,
// and gets of matrix i in to[i] the pair at row l / 4, columns 2 (l % 4) and the next. Without bank
// conflicts where the rows of each matrix lie in different sixteenths of 128 bytes.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const Cell* row) {
#if defined(__CUDACC__)
  DMFAST_MMA("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]),
             "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
#else
  emulation::load_matrices(to, row);
#endif
}

// Copies a cell to shared memory behind the thread's back. It is there for the thread that asked
// for it after a wait, for others after a barrier too.
__device__ __forceinline__ void copy_async(Cell* to, const Cell* from) {
#if defined(__CUDACC__)
  DMFAST_MMA("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
             "l"(from) : "memory");
#else
  emulation::copy_async(to, from);
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDACC__)
  DMFAST_MMA("cp.async.commit_group;" :: : "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits for all groups but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDACC__)
  DMFAST_MMA("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulation::wait_for_copies(kLeft);
#endif
}

}  // namespace dmfast

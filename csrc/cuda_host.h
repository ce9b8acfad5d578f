// SPDX-License-Identifier: MIT
// The one include of every .cu: the CUDA runtime under nvcc; under a host compiler an emulation
// that runs each block's threads on the CPU, so that the source that runs on a GPU is tested, and
// seen by the sanitizers, where there is none.
//
//   DMFAST_SHARED(type, name, count);  an array in shared memory, whatever the constructors of type
//   DMFAST_LAUNCH(kernel, grid, block, stream, arguments...)  gives a CUDA error code, 0 for none
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define DMFAST_SHARED(type, name, count)                                              \
  alignas(16) __shared__ unsigned char name##_bytes[sizeof(type) * (count)];          \
  static_assert(alignof(type) <= 16, "shared memory is aligned for the widest load"); \
  type* const name = reinterpret_cast<type*>(name##_bytes)

#define DMFAST_LAUNCH(kernel, grid, block, stream, ...)                            \
  (kernel<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))

#else

#include "cuda_emulation.h"

#endif

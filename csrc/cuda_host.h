// SPDX-License-Identifier: MIT
// The one include of every .cu: the CUDA runtime under nvcc; under a host compiler an emulation
// that runs each block's threads on the CPU, so that the source that runs on a GPU is tested, and
// seen by the sanitizers, where there is none.
//
//   DMFAST_SHARED(type, name, count);  an array in shared memory, whatever the constructors of type
//   DMFAST_LAUNCH(kernel, grid, block, stream, arguments...)  gives a CUDA error code, 0 for none
//   DMFAST_SHARED_BYTES(name);  the shared memory that a launch gives, aligned to 16 bytes:
//   DMFAST_LAUNCH_SHARED(kernel, grid, block, bytes, stream, arguments...)
//   allow_shared_bytes<kernel>()  comes before such a launch
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <utility>

#define DMFAST_SHARED(type, name, count)                                              \
  alignas(16) __shared__ unsigned char name##_bytes[sizeof(type) * (count)];          \
  static_assert(alignof(type) <= 16, "shared memory is aligned for the widest load"); \
  type* const name = reinterpret_cast<type*>(name##_bytes)

#define DMFAST_SHARED_BYTES(name)          \
  extern __shared__ uint4 dmfast_shared[]; \
  char* const name = reinterpret_cast<char*>(dmfast_shared)

#define DMFAST_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...)                    \
  (kernel<<<(grid), (block), (bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))

#define DMFAST_LAUNCH(kernel, grid, block, stream, ...) \
  DMFAST_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)

namespace dmfast {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// What the blocks of a multiprocessor share, with 1 KB for each beside what it asks for; and what
// one block can have of it.
inline int multiprocessor_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

inline int block_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Of bfloat16, and copies behind a thread's back: see mma_cuda.h.
inline bool has_tensor_cores() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

// More than 48 KB in a launch must be asked for, once for each kernel and device. The kernel has no
// DMFAST_SHARED beside it.
template <auto kKernel>
int allow_shared_bytes() {
  static std::atomic<uint64_t> allowed{0};
  int device = 0;
  const int error = static_cast<int>(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error != 0 || (allowed.load() & bit)) return error;
  for (const auto& [attribute, value] :
       {std::pair{cudaFuncAttributeMaxDynamicSharedMemorySize, block_shared_bytes()},
        std::pair{cudaFuncAttributePreferredSharedMemoryCarveout, 100}}) {
    const cudaError_t failed = cudaFuncSetAttribute(kKernel, attribute, value);
    if (failed != cudaSuccess) return static_cast<int>(failed);
  }
  allowed.fetch_or(bit);
  return 0;
}

}  // namespace dmfast

#else

#include "cuda_emulation.h"

#endif

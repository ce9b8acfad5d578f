// SPDX-License-Identifier: MIT
// Marks a function for both the host and the GPU; a host compiler sees a plain inline function.
#pragma once

#if defined(__CUDACC__)
#define DMFAST_HD __host__ __device__ __forceinline__
#else
#define DMFAST_HD inline
#endif

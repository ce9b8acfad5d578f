// SPDX-License-Identifier: MIT
// Marks a function for both the host and the GPU; a host compiler sees a plain inline function.
#pragma once

// Loops that nvcc is told to unroll, or not to: copies of a large body cost registers.
#if defined(__CUDACC__)
#define DMFAST_HD __host__ __device__ __forceinline__
#define DMFAST_UNROLL _Pragma("unroll")
#define DMFAST_ROLLED _Pragma("unroll 1")
#else
#define DMFAST_HD inline
#define DMFAST_UNROLL
#define DMFAST_ROLLED
#endif

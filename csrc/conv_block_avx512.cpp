// SPDX-License-Identifier: MIT
// The block's kernels with AVX-512; setup.py gives this file the flags.
#ifdef __x86_64__
#define DMFAST_SET avx512
#define DMFAST_LANES 16
#define DMFAST_ROWS 8
#include "thin_block_simd.h"
#endif

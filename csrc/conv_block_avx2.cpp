// SPDX-License-Identifier: MIT
// The block's kernels with AVX2 and FMA; setup.py gives this file the flags.
#ifdef __x86_64__
#define DMFAST_SET avx2
#define DMFAST_LANES 8
#define DMFAST_ROWS 4
#include "thin_block_simd.h"
#endif

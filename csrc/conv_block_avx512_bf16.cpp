// SPDX-License-Identifier: MIT
// The block's kernels with AVX-512 and its products of bfloat16; setup.py gives this file the
// flags.
#ifdef __x86_64__
#define DMFAST_SET avx512_bf16
#define DMFAST_LANES 16
#define DMFAST_ROWS 8
#define DMFAST_BF16_PRODUCTS
#include "thin_block_simd.h"
#endif

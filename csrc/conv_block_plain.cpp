// SPDX-License-Identifier: MIT
// The block's kernels for any processor; setup.py gives this file the flags.
#define DMFAST_SET plain
#define DMFAST_LANES 4
#define DMFAST_ROWS 4
#include "thin_block_simd.h"

// SPDX-License-Identifier: MIT
// The augmentation loops for AVX-512.
#include "augment_isa.h"
#include "augment_plan.h"
#include "loop_headers.h"
#if DMFAST_CPU_ISAS
#include "target_avx512.h"
#endif
#include "augment_loops.h"

namespace dmfast {

const AugmentLoops& augment_loops_avx512() { return kLoops; }

}  // namespace dmfast

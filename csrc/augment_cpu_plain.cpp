// SPDX-License-Identifier: MIT
// The augmentation loops for every machine.
#include "augment_isa.h"
#include "augment_loops.h"

namespace dmfast {

const AugmentLoops& augment_loops_plain() { return kLoops; }

}  // namespace dmfast

// SPDX-License-Identifier: MIT
// What the headers of loops need, to be included before a pragma changes what code is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_isa.h"
#include "cpu_types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

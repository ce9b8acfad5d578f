// SPDX-License-Identifier: MIT
// What is defined after this is compiled for AVX2, by gcc on x86-64: see cpu_isa.h.
#pragma once

// A list of features, not an architecture: only so may gcc inline what came before.
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define DMFAST_F16C
#define DMFAST_VECTOR_BYTES 32

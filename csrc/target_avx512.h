// SPDX-License-Identifier: MIT
// What is defined after this is compiled for AVX-512, by gcc on x86-64: see cpu_isa.h.
#pragma once

// A list of features, not an architecture: only so may gcc inline what came before.
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#define DMFAST_F16C
#define DMFAST_VECTOR_BYTES 64

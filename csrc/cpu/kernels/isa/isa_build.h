// Which instruction sets this compiler builds kernels for: the ISA files and cpu_features.cpp agree by it.
#pragma once

#include "cpu/kernels/isa/isa_targets.h"

#if defined(__x86_64__)
#define DWCONV_BUILDS_X86 1
#if __has_include(<avx512bf16intrin.h>)  // GCC 10, Clang 9
#define DWCONV_BUILDS_AVX512_BF16 1
#endif
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)  // GCC 11, Clang 12
#define DWCONV_BUILDS_AMX 1
#endif
#endif

#if defined(__aarch64__)
#define DWCONV_BUILDS_NEON 1
#if defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10  // whose arm_neon.h has bfloat16 for a function's target
#define DWCONV_BUILDS_NEON_BF16 1
#endif
#endif

// Between these two, functions are compiled for `features`, a string.
#define DWCONV_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DWCONV_BEGIN_TARGET(features) DWCONV_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DWCONV_END_TARGET _Pragma("clang attribute pop")
#else
#define DWCONV_BEGIN_TARGET(features) DWCONV_PRAGMA(GCC target(features))
#define DWCONV_END_TARGET
#endif

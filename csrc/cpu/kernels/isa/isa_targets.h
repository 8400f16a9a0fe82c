// What the compiler may use for each instruction set's kernels, and the widest vectors that kernels write as intrinsics.
#pragma once

#define DWCONV_TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define DWCONV_TARGET_AVX512_BF16 DWCONV_TARGET_AVX512 ",avx512bf16"
#define DWCONV_TARGET_AMX DWCONV_TARGET_AVX512_BF16 ",amx-tile,amx-bf16"
#if defined(__clang__)
#define DWCONV_TARGET_NEON_BF16 "bf16"
#else
#define DWCONV_TARGET_NEON_BF16 "arch=armv8.2-a+bf16"
#endif
#define DWCONV_INTRINSIC_BYTES 64

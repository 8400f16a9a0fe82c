// The 64-byte sets compiled for AVX2: their vectors are pairs of registers, and nothing is written as intrinsics.
#pragma once

#define DWCONV_TARGET_AVX512 "avx2,fma,f16c"
#define DWCONV_TARGET_AVX512_BF16 DWCONV_TARGET_AVX512
#define DWCONV_TARGET_AMX DWCONV_TARGET_AVX512
#define DWCONV_INTRINSIC_BYTES 32

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define DWCONV_ISA avx512
#define DWCONV_ISA_ID Isa::kAvx512
#define DWCONV_VECTOR_BYTES 64
#include "isa_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

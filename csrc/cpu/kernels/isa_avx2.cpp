#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define DWCONV_ISA avx2
#define DWCONV_ISA_ID Isa::kAvx2
#define DWCONV_VECTOR_BYTES 32
#include "isa_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

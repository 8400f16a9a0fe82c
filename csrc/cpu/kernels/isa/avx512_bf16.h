// Compiles the family of kernels that the including file names (isa_table.h).
#include "cpu/kernels/isa/isa_build.h"
#if defined(DWCONV_BUILDS_AVX512_BF16)
DWCONV_BEGIN_TARGET(DWCONV_TARGET_AVX512_BF16)
#define DWCONV_ISA avx512_bf16
#define DWCONV_ISA_ID Isa::kAvx512Bf16
#define DWCONV_VECTOR_BYTES 64
#define DWCONV_CORES avx512
#define DWCONV_BFLOAT16_PAIRS
#include "cpu/kernels/isa_table.h"
DWCONV_END_TARGET
#endif

// Compiles the family of kernels that the including file names (isa_table.h).
#include "cpu/kernels/isa/isa_build.h"
#if defined(DWCONV_BUILDS_X86)
DWCONV_BEGIN_TARGET(DWCONV_TARGET_AVX512)
#define DWCONV_ISA avx512
#define DWCONV_ISA_ID Isa::kAvx512
#define DWCONV_VECTOR_BYTES 64
#include "cpu/kernels/isa_table.h"
DWCONV_END_TARGET
#endif

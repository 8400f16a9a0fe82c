// Compiles the family of kernels that the including file names (isa_table.h).
#include "cpu/kernels/isa/isa_build.h"
#if defined(DWCONV_BUILDS_AMX)
DWCONV_BEGIN_TARGET(DWCONV_TARGET_AMX)
#define DWCONV_ISA amx
#define DWCONV_ISA_ID Isa::kAmx
#define DWCONV_VECTOR_BYTES 64
#define DWCONV_CORES avx512
#define DWCONV_BFLOAT16_PAIRS
#define DWCONV_AMX
#include "cpu/kernels/isa_table.h"
DWCONV_END_TARGET
#endif

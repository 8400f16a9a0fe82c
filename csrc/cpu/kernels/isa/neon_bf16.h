// Compiles the family of kernels that the including file names (isa_table.h).
#include "cpu/kernels/isa/isa_build.h"
#if defined(DWCONV_BUILDS_NEON_BF16)
DWCONV_BEGIN_TARGET(DWCONV_TARGET_NEON_BF16)
#define DWCONV_ISA neon_bf16
#define DWCONV_ISA_ID Isa::kNeonBf16
#define DWCONV_VECTOR_BYTES 16
#define DWCONV_NEON
#define DWCONV_CORES neon
#define DWCONV_BFLOAT16_PAIRS
#include "cpu/kernels/isa_table.h"
DWCONV_END_TARGET
#endif

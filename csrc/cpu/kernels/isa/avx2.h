// Compiles the family of kernels that the including file names (isa_table.h).
#include "cpu/kernels/isa/isa_build.h"
#if defined(DWCONV_BUILDS_X86)
DWCONV_BEGIN_TARGET("avx2,fma,f16c")
#define DWCONV_ISA avx2
#define DWCONV_ISA_ID Isa::kAvx2
#define DWCONV_VECTOR_BYTES 32
#include "cpu/kernels/isa_table.h"
DWCONV_END_TARGET
#endif

// Compiles the family of kernels that the including file names (isa_table.h).
// What every AArch64 processor has. float16's conversions are part of it, so that there is no set for float16: sums are float32.
#include "cpu/kernels/isa/isa_build.h"
#if defined(DWCONV_BUILDS_NEON)
#define DWCONV_ISA neon
#define DWCONV_ISA_ID Isa::kNeon
#define DWCONV_VECTOR_BYTES 16
#define DWCONV_NEON
#include "cpu/kernels/isa_table.h"
#endif

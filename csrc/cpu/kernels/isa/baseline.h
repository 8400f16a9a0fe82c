// Compiles the family of kernels that the including file names (isa_table.h).
// 16-byte vectors: x86-64's SSE2, or whatever else the compiler maps them to. General rows only.
#define DWCONV_ISA baseline
#define DWCONV_ISA_ID Isa::kBaseline
#define DWCONV_VECTOR_BYTES 16
#define DWCONV_BASELINE
#include "cpu/kernels/isa_table.h"

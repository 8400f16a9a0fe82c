#define DWCONV_BLOCKS
#include "cpu/kernels/isa/neon_bf16.h"

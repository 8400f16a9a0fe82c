#define DWCONV_BLOCKS
#include "cpu/kernels/isa/avx512_bf16.h"

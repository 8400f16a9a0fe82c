#define DWCONV_BLOCKS
#include "cpu/kernels/isa/avx512.h"

#define DWCONV_BLOCKS
#include "cpu/kernels/isa/avx2.h"

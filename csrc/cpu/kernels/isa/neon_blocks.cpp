#define DWCONV_BLOCKS
#include "cpu/kernels/isa/neon.h"

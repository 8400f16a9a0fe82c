#define DWCONV_BLOCKS
#include "cpu/kernels/isa/amx.h"
